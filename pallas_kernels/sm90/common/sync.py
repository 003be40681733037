"""Barriers in shared memory: a block's, and raw mbarriers for what Pallas' barriers cannot count.

Consumers say with a raw mbarrier that a stage's slot is free: one arrival a warp, where Pallas has one a thread or a
warpgroup. In a cluster every warp arrives for itself on both CTAs' barriers, so none of its reads can still be under
way when the slot is written again.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.sm90.common.ptx import SCALAR, asm, const, inlined, shared_address


def init_barriers(ref: Any, arrivals: int, *, cluster: bool) -> None:
    """Initialize mbarriers for ``arrivals`` each in ref, int32 [count, 2] in SMEM.

    All threads of the CTA (or cluster) call this, and wait for one another.
    """

    @inlined(arg_types=(plgpu.RefType(),))
    def inline(_: Any, barriers: ir.Value) -> None:
        count, _ = ir.MemRefType(barriers.type).shape
        code = "".join(f"@p mbarrier.init.shared::cta.b64 [$0 + {8 * i}], {arrivals};\n" for i in range(count))
        sync = (
            "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
            if cluster
            else "bar.sync 0;"
        )
        asm(
            [],
            [shared_address(barriers), utils.thread_idx()],
            f"{{\n.reg .pred p;\nsetp.eq.u32 p, $1, 0;\n{code}fence.mbarrier_init.release.cluster;\n{sync}\n}}",
            volatile=True,
        )

    inline(ref)


def arrive(ref: Any, slot: jax.Array, *, cluster_size: int) -> None:
    """One arrival a warp on ref[slot], in every CTA of the cluster."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, barriers: ir.Value, index: mgpu.FragmentedArray) -> None:
        address = arith.addi(shared_address(barriers), arith.muli(index.registers.item(), const(8)))
        lane = arith.andi(utils.thread_idx(), const(31))
        if cluster_size == 1:
            code = "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
        else:
            # Not a release for the cluster, which would be a fence for all memory: what comes before are only reads,
            # whose values are already in registers.
            code = "mapa.shared::cluster.u32 a, $0, $1;\n@p mbarrier.arrive.shared::cluster.b64 _, [a];"
        asm(
            [],
            [address, lane],
            f"{{\n.reg .pred p;\n.reg .b32 a;\nsetp.lt.u32 p, $1, {cluster_size};\n{code}\n}}",
            volatile=True,
        )

    inline(ref, slot)


def wait(ref: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Wait until the phase of ref[slot] with this parity (0 or 1) has completed."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, barriers: ir.Value, index: mgpu.FragmentedArray, phase: mgpu.FragmentedArray) -> None:
        emit_wait(barriers, index.registers.item(), phase.registers.item())

    inline(ref, slot, parity)


def emit_wait(barriers: ir.Value, slot: ir.Value, parity: ir.Value) -> None:
    """``wait``, for device code: emitted where it is called."""
    address = arith.addi(shared_address(barriers), arith.muli(slot, const(8)))
    asm(
        [],
        [address, parity],
        "{\n.reg .pred p;\nretry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n"
        "@p bra.uni done;\nbra.uni retry;\ndone:\n}",
        volatile=True,
    )


def cta_barrier() -> None:
    """All threads of the CTA wait for one another; writes to SMEM before it are seen after it."""

    @inlined()
    def inline(_: Any) -> None:
        asm([], [], "bar.sync 0;", volatile=True)

    inline()
