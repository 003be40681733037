"""Barriers of the Hopper matmul's ring, and the sum over the CTAs of a cluster that share a tile.

"Slot free" barriers are raw mbarriers: one arrival a warp instead of Pallas' one a thread, and in
a cluster every warp speaks for itself, so no warp's reads can be overtaken by another's arrival.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.matmul_device_sm90 import (
    SCALAR,
    WARPGROUP,
    asm,
    const,
    element,
    i32,
    inlined,
    load,
    shared_address,
    thread,
)


def init_barriers(ref: Any, arrivals: int, *, cluster: bool) -> None:
    """Make mbarriers of ref, int32 [count, 2] in SMEM; all threads of the CTA (or cluster) call this."""

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
            "r,r",
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
            # No qualifiers: a release for the cluster would be a fence of all memory, and what this
            # orders are reads whose values have arrived.
            code = "mapa.shared::cluster.u32 a, $0, $1;\n@p mbarrier.arrive.shared::cluster.b64 _, [a];"
        asm(
            [],
            [address, lane],
            f"{{\n.reg .pred p;\n.reg .b32 a;\nsetp.lt.u32 p, $1, {cluster_size};\n{code}\n}}",
            "r,r",
            volatile=True,
        )

    inline(ref, slot)


def wait(ref: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Wait until the phase of ref[slot] with this parity (0 or 1) has completed."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, barriers: ir.Value, index: mgpu.FragmentedArray, phase: mgpu.FragmentedArray) -> None:
        address = arith.addi(shared_address(barriers), arith.muli(index.registers.item(), const(8)))
        asm(
            [],
            [address, phase.registers.item()],
            "{\n.reg .pred p;\nretry:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n"
            "@p bra.uni done;\nbra.uni retry;\ndone:\n}",
            "r,r",
            volatile=True,
        )

    inline(ref, slot, parity)


def cluster_barrier() -> None:
    """All running threads of the cluster meet; writes to SMEM before it are seen after it."""

    @inlined()
    def inline(_: Any) -> None:
        code = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
        asm([], [], code, "", volatile=True)

    inline()


def send_partial(acc: jax.Array, ring_ref: Any) -> None:
    """Write acc to ring_ref, int32 [64 * tokens] in SMEM, of the cluster's first CTA."""

    @inlined(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def inline(_: Any, acc: mgpu.FragmentedArray, ring: ir.Value) -> None:
        address = arith.addi(shared_address(ring), arith.muli(thread(), const(16)))
        (remote,) = asm([i32()], [address, const(0)], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", volatile=False)
        for j, registers in enumerate(acc.registers.reshape(-1, 2)):
            floats = [element(v, i) for v in registers for i in range(2)]
            code = f"st.shared::cluster.v4.f32 [$0 + {16 * WARPGROUP * j}], {{$1, $2, $3, $4}};"
            asm([], [remote, *floats], code, "r,f,f,f,f", volatile=True)

    inline(acc, ring_ref)


def add_partial(acc: jax.Array, ring_ref: Any) -> jax.Array:
    """acc plus what a CTA of the cluster has put into this CTA's ring_ref."""

    @inlined(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def inline(_: Any, acc: mgpu.FragmentedArray, ring: ir.Value) -> mgpu.FragmentedArray:
        quad = ir.VectorType.get((4,), ir.F32Type.get())
        summed = np.empty((acc.shape[1] // 8, 2), object)
        for j, registers in enumerate(acc.registers.reshape(-1, 2)):
            partial = load(ring, arith.addi(thread(), const(WARPGROUP * j)), quad, quad)
            for r in range(2):
                half = vector.extract_strided_slice(
                    ir.VectorType.get((2,), ir.F32Type.get()), partial, [2 * r], [2], [1]
                )
                summed[j, r] = arith.addf(registers[r], half)
        return mgpu.FragmentedArray(_registers=summed.reshape(acc.registers.shape), _layout=acc.layout, _is_signed=None)

    return inline(acc, ring_ref)
