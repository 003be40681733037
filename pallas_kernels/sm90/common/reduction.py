"""A row over the threads of a block: who has which columns, and what they find out together."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu
from jaxlib.mlir.dialects import math as math_ops

from pallas_kernels.sm90.common.ptx import asm, const, f32, i32, number, shared_address
from pallas_kernels.sm90.common.sync import emit_wait


def own_units(units: int, threads: int, thread: ir.Value | None = None) -> tuple[list[ir.Value], ir.Value | None]:
    """Which of a row's ``units`` this thread has, and whether the last is its own; None where all threads' are.

    Threads beyond the row's end do the last unit once more; only a sum must not count it.

    Args:
        units: of the row.
        threads: that share it.
        thread: which of them this is; that of a block by default.
    """
    steps, thread = -(-units // threads), utils.thread_idx() if thread is None else thread
    index: list[ir.Value] = [arith.addi(thread, const(step * threads)) for step in range(steps)]
    if units % threads == 0:
        return index, None
    inside = arith.cmpi(arith.CmpIPredicate.ult, index[-1], const(units))
    return [*index[:-1], arith.minui(index[-1], const(units - 1))], inside


def weighted(
    held: list[list[ir.Value]], factors: list[list[ir.Value]], inside: ir.Value | None
) -> tuple[list[list[ir.Value]], ir.Value, ir.Value]:
    """This thread's units times a norm's weight, their absmax, and the sum of squares without the weight.

    Args:
        held: the units' elements.
        factors: the weight's.
        inside: as ``own_units`` has it.
    """
    squares = [sum_of_squares(elements) for elements in held]
    if inside is not None:
        squares[-1] = arith.select(inside, squares[-1], number(0.0))
    total = tree(arith.addf, squares)
    scaled: list[list[ir.Value]] = [
        [arith.mulf(e, f) for e, f in zip(*pair, strict=True)] for pair in zip(held, factors, strict=True)
    ]
    # Inf may count: the scale of a row with Inf is NaN, whatever its values.
    largest = tree(larger, [math_ops.absf(element) for elements in scaled for element in elements])
    return scaled, largest, total


def over_block(
    largest: ir.Value,
    total: ir.Value | None,
    partials: ir.Value,
    warpgroups: int,
    barrier: Callable[[], Any] = gpu.barrier,
) -> tuple[ir.Value, ir.Value | None]:
    """The maximum of ``largest`` (not negative) and the sum of ``total`` over the threads of some warpgroups.

    Args:
        largest: of this thread.
        total: of this thread.
        partials: float32 [2 * warps] in SMEM.
        warpgroups: the block's first.
        barrier: for their threads.
    """
    warps, thread = 4 * warpgroups, utils.thread_idx()
    found = _over_warp(largest, total)
    shared = shared_address(partials)
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, const(31)), const(0))):
        place = arith.addi(shared, arith.muli(arith.shrui(thread, const(5)), const(4)))
        for i, number in enumerate(found):
            asm([], [place, number], f"st.shared.f32 [$0 + {4 * warps * i}], $1;", volatile=True)
    barrier()
    results = []
    for i, combine in zip(range(len(found)), (larger, arith.addf), strict=False):
        places = range(4 * warps * i, 4 * warps * (i + 1), 16)
        results.append(tree(combine, [number for place in places for number in _four(shared, place)]))
    return results[0], results[1] if total is not None else None


def start_over_cluster(
    partials: Sequence[ir.Value],
    arrived: ir.Value,
    peer: ir.Value,
    warpgroups: int,
    cluster: int,
    *,
    with_sum: Sequence[bool],
) -> list[Callable[[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value | None]]]:
    """Get ready to do what ``over_block`` does a few times, over a cluster's threads.

    What is returned does it, one after the other, with a thread's numbers.

    No fence waits for memory: a number that a warp sends to another block counts there as a barrier's bytes.
    The sum has one order, whichever warp is first.

    Args:
        partials: for each time float32 [2 * cluster * warps] in SMEM, cluster * warps up to 128.
        arrived: int32 [times, 2] in SMEM, the mbarriers.
        peer: which block of the cluster this is.
        warpgroups: of a block.
        cluster: blocks.
        with_sum: for each time whether there will be one.
    """
    warps, all_warps, thread = 4 * warpgroups, 4 * warpgroups * cluster, utils.thread_idx()
    shared, barrier = [shared_address(ref) for ref in partials], shared_address(arrived)
    places = [f"$0 + {8 * i}" if i else "$0" for i in range(len(shared))]
    inits = [
        f"""@p mbarrier.init.shared::cta.b64 [{place}], 1;
        @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [{place}], {4 * all_warps * (1 + summed)};
        """
        for place, summed in zip(places, with_sum, strict=True)
    ]
    code = f"""{{
        .reg .pred p;
        setp.eq.u32 p, $1, 0;
        {"".join(inits)}fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed.aligned;
    }}"""
    asm([], [barrier, thread], code, volatile=True)

    def finish(
        largest: ir.Value, total: ir.Value | None, *, time: int, shared: ir.Value
    ) -> tuple[ir.Value, ir.Value | None]:
        lane, warp = arith.andi(thread, const(31)), arith.shrui(thread, const(5))
        place = arith.addi(shared, arith.muli(arith.addi(arith.muli(peer, const(warps)), warp), const(4)))
        found = _over_warp(largest, total)
        counted = arith.addi(barrier, const(8 * time)) if time else barrier
        if time == 0:
            asm([], [], "barrier.cluster.wait.acquire.aligned;", volatile=True)
        for i, own in enumerate(found):
            # Each of a warp's first lanes sends to another block.
            code = f"""{{
                .reg .pred p;
                .reg .b32 to, counted;
                setp.lt.u32 p, $2, {cluster};
                @p mapa.shared::cluster.u32 to, $0, $2;
                @p mapa.shared::cluster.u32 counted, $3, $2;
                @p st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to + {4 * all_warps * i}], $1, [counted];
            }}"""
            asm([], [place, own, lane, counted], code, volatile=True)
        emit_wait(arrived, const(time), const(0))
        quads = all_warps // 4
        quad = arith.addi(shared, arith.muli(arith.minui(lane, const(quads - 1)), const(16)))
        largest = tree(larger, _four(quad))
        if total is not None:
            # Lanes beyond the last quad have read it once more.
            total = tree(arith.addf, _four(quad, 4 * all_warps))
            total = arith.select(arith.cmpi(arith.CmpIPredicate.ult, lane, const(quads)), total, number(0.0))
        results = _over_warp(largest, total)
        return results[0], results[1] if total is not None else None

    return [functools.partial(finish, time=i, shared=ref) for i, ref in enumerate(shared)]


def _over_warp(largest: ir.Value, total: ir.Value | None) -> list[ir.Value]:
    """The maximum (of numbers that are not negative) over a warp, and the sum where there is one."""
    # Such floats order as their bits do.
    bits = asm([i32()], [largest], "redux.sync.max.u32 $0, $1, 0xffffffff;", volatile=True)
    found: list[ir.Value] = [arith.bitcast(f32(), bits[0])]
    if total is not None:
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        found.append(total)
    return found


def _four(place: ir.Value, offset: int = 0) -> list[ir.Value]:
    """float32 in shared memory."""
    code = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
    return asm([f32()] * 4, [place], code, volatile=True)


def sum_of_squares(elements: list[ir.Value]) -> ir.Value:
    """Of float32, one after the other."""
    total = arith.mulf(elements[0], elements[0])
    for element in elements[1:]:
        total = math_ops.fma(element, element, total)
    return total


def inverse_rms(total: ir.Value, width: int, eps: float) -> ir.Value:
    """1 / sqrt(total / width + eps), within 2 ulp; NaN if ``total`` is not finite."""
    mean_square = arith.mulf(total, number(1 / width))
    (inverse,) = asm([f32()], [arith.addf(mean_square, number(eps))], "rsqrt.approx.f32 $0, $1;", volatile=False)
    return math_ops.fma(mean_square, number(0.0), inverse)


def larger(x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger number; NaN loses against any."""
    return arith.maxnumf(x, y)


def tree(combine: Any, numbers: Sequence[ir.Value]) -> ir.Value:
    """All numbers combined, halves first."""
    if len(numbers) == 1:
        return numbers[0]
    middle = len(numbers) // 2
    return combine(tree(combine, numbers[:middle]), tree(combine, numbers[middle:]))
