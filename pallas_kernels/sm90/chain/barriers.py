"""Barriers of the chain kernel: of a block's consumers, and of the grid."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.sm90.chain.schedule import THREADS
from pallas_kernels.sm90.common.memory import address
from pallas_kernels.sm90.common.ptx import SCALAR, WARPGROUP, asm, const, inlined


def barrier() -> None:
    """The threads of the block's consumers wait for one another."""
    inlined()(lambda _: emit_barrier())()


def emit_barrier() -> None:
    """``barrier``, in device code."""
    asm([], [], f"bar.sync 1, {THREADS};", volatile=True)


def emit_loads_started() -> None:
    """All warpgroups wait until the consumers have issued an input's loads and the producer all copies before these."""
    asm([], [], f"bar.sync 2, {THREADS + WARPGROUP};", volatile=True)


def fence_operand() -> None:
    """Make what this thread has written to shared memory visible to WGMMA, then wait for the block's consumers."""

    @inlined()
    def inline(_: Any) -> None:
        asm([], [], "fence.proxy.async.shared::cta;", volatile=True)
        emit_barrier()

    inline()


def init_state(state_ref: Any, block: jax.Array) -> None:
    """Initialize the state of ``grid_barrier`` for a later kernel."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, state: ir.Value, block: Any) -> None:
        index = arith.addi(arith.muli(block.registers.item(), const(THREADS)), utils.thread_idx())
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, index, const(0))):
            asm([], [address(state)], "st.global.b32 [$0], 0;", volatile=True)

    inline(state_ref, block)


def grid_barrier(state_ref: Any, block: jax.Array, blocks: int, number: int) -> None:
    """The consumers of all ``blocks`` blocks wait for one another; writes to memory before it are seen after it.

    Blocks count in the low bits of ``state_ref`` (int32 [1] in GMEM, from ``init_state``). Block 0 adds what brings
    these back to zero once all have counted and flips the highest bit; all blocks wait for that bit. ``number`` counts
    a kernel's barriers from 0. All blocks must run at once.
    """
    still_waiting = "lt" if number % 2 else "ge"

    @inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, state: ir.Value, block: Any) -> None:
        emit_barrier()
        first = arith.cmpi(arith.CmpIPredicate.eq, block.registers.item(), const(0))
        arrival = arith.select(first, const((1 << 31) - (blocks - 1)), const(1))
        asm(
            [],
            [address(state), arrival, utils.thread_idx()],
            f"""{{
            .reg .pred p;
            .reg .b32 now;
            setp.ne.u32 p, $2, 0;
            @p bra done;
            red.release.gpu.global.add.u32 [$0], $1;
            wait:
            ld.acquire.gpu.global.u32 now, [$0];
            setp.{still_waiting}.s32 p, now, 0;
            @p bra wait;
            done:
            }}""",
            volatile=True,
        )
        emit_barrier()

    inline(state_ref, block)
