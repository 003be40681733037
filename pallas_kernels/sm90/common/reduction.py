"""A row shared by the threads of a block or a cluster: which columns each has, and reductions over all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu
from jaxlib.mlir.dialects import math as math_ops

from pallas_kernels.sm90.common.ptx import asm, const, f32, i32, number, shared_address
from pallas_kernels.sm90.common.sync import emit_wait


def own_units(units: int, threads: int, thread: ir.Value | None = None) -> tuple[list[ir.Value], ir.Value | None]:
    """Indices of a thread's units of a row, and whether the last of them is its own; None where every thread's is.

    Threads past the row's end repeat the last unit, so that all threads run the same code; a maximum does not
    notice, and a sum must leave it out.

    Args:
        units: of the row.
        threads: that share it.
        thread: which of them this is; the index in its block by default.
    """
    steps, thread = pl.cdiv(units, threads), utils.thread_idx() if thread is None else thread
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
        inside: from ``own_units``.
    """
    squares = [sum_of_squares(elements) for elements in held]
    if inside is not None:
        squares[-1] = arith.select(inside, squares[-1], number(0.0))
    square_sum = tree(arith.addf, squares)
    scaled: list[list[ir.Value]] = [
        [arith.mulf(e, f) for e, f in zip(*pair, strict=True)] for pair in zip(held, factors, strict=True)
    ]
    # Inf may count: the scale of a row with Inf is NaN, whatever its values.
    absmax = tree(larger, [math_ops.absf(element) for elements in scaled for element in elements])
    return scaled, absmax, square_sum


def over_block(
    absmax: ir.Value,
    square_sum: ir.Value | None,
    partials: ir.Value,
    warpgroups: int,
    barrier: Callable[[], Any] = gpu.barrier,
) -> tuple[ir.Value, ir.Value | None]:
    """The maximum of ``absmax`` (not negative) and the sum of ``square_sum`` over the threads of some warpgroups.

    Args:
        absmax: of this thread.
        square_sum: of this thread.
        partials: float32 [2 * warps] in SMEM.
        warpgroups: how many of the block's, from the first on.
        barrier: for their threads.
    """
    warps, thread = 4 * warpgroups, utils.thread_idx()
    found = _over_warp(absmax, square_sum)
    shared = shared_address(partials)
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, const(31)), const(0))):
        place = arith.addi(shared, arith.muli(arith.shrui(thread, const(5)), const(4)))
        for i, number in enumerate(found):
            asm([], [place, number], f"st.shared.f32 [$0 + {4 * warps * i}], $1;", volatile=True)
    barrier()
    results = []
    for i, combine in zip(range(len(found)), (larger, arith.addf), strict=False):
        places = range(4 * warps * i, 4 * warps * (i + 1), 16)
        results.append(tree(combine, [number for place in places for number in _load_four(shared, place)]))
    return results[0], results[1] if square_sum is not None else None


def start_over_cluster(
    partials: Sequence[ir.Value],
    arrived: ir.Value,
    peer: ir.Value,
    warpgroups: int,
    cluster: int,
    *,
    with_sum: Sequence[bool],
) -> list[Callable[[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value | None]]]:
    """Prepare to reduce over the threads of a cluster, ``len(partials)`` times.

    A number that a warp stores into another block's memory counts there as a barrier's bytes, so no fence waits for
    memory. Sums have one order, whichever warp arrives first.

    Args:
        partials: for each reduction float32 [2 * cluster * warps] in SMEM; cluster * warps is 128 at most.
        arrived: int32 [reductions, 2] in SMEM, the mbarriers.
        peer: index of this block in the cluster.
        warpgroups: of a block.
        cluster: blocks.
        with_sum: for each reduction whether there is a ``square_sum``.

    Returns:
        For each reduction a function that emits it, with ``over_block``'s first two arguments and results; to be
        called in this order.
    """
    warps, all_warps, thread = 4 * warpgroups, 4 * warpgroups * cluster, utils.thread_idx()
    shared, barrier = [shared_address(ref) for ref in partials], shared_address(arrived)
    _init_arrivals(barrier, thread, [4 * all_warps * (1 + summed) for summed in with_sum])

    def reduce(
        absmax: ir.Value, square_sum: ir.Value | None, *, time: int, shared: ir.Value
    ) -> tuple[ir.Value, ir.Value | None]:
        lane, warp = arith.andi(thread, const(31)), arith.shrui(thread, const(5))
        place = arith.addi(shared, arith.muli(arith.addi(arith.muli(peer, const(warps)), warp), const(4)))
        found = _over_warp(absmax, square_sum)
        counted = arith.addi(barrier, const(8 * time)) if time else barrier
        if time == 0:
            asm([], [], "barrier.cluster.wait.acquire.aligned;", volatile=True)
        for i, own in enumerate(found):
            # Lane b of each warp stores into block b.
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
        return _over_partials(shared, lane, all_warps, summed=square_sum is not None)

    return [functools.partial(reduce, time=i, shared=ref) for i, ref in enumerate(shared)]


def _init_arrivals(barrier: ir.Value, thread: ir.Value, sizes: Sequence[int]) -> None:
    """Make mbarriers that expect so many bytes each, and arrive at the cluster's barrier."""
    places = [f"$0 + {8 * i}" if i else "$0" for i in range(len(sizes))]
    inits = [
        f"""@p mbarrier.init.shared::cta.b64 [{place}], 1;
        @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [{place}], {size};
        """
        for place, size in zip(places, sizes, strict=True)
    ]
    code = f"""{{
        .reg .pred p;
        setp.eq.u32 p, $1, 0;
        {"".join(inits)}fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed.aligned;
    }}"""
    asm([], [barrier, thread], code, volatile=True)


def _over_partials(shared: ir.Value, lane: ir.Value, count: int, *, summed: bool) -> tuple[ir.Value, ir.Value | None]:
    """The maximum of ``count`` float32 in shared memory, and the sum of as many behind them, in each warp."""
    quads = count // 4
    quad = arith.addi(shared, arith.muli(arith.minui(lane, const(quads - 1)), const(16)))
    absmax, square_sum = tree(larger, _load_four(quad)), None
    if summed:
        # Lanes past the last quad have loaded it once more.
        square_sum = tree(arith.addf, _load_four(quad, 4 * count))
        inside = arith.cmpi(arith.CmpIPredicate.ult, lane, const(quads))
        square_sum = arith.select(inside, square_sum, number(0.0))
    results = _over_warp(absmax, square_sum)
    return results[0], results[1] if summed else None


def _over_warp(absmax: ir.Value, square_sum: ir.Value | None) -> list[ir.Value]:
    """The maximum (of numbers that are not negative) over a warp, and the sum where there is one."""
    # Floats that are not negative order as their bits do.
    bits = asm([i32()], [absmax], "redux.sync.max.u32 $0, $1, 0xffffffff;", volatile=True)
    found: list[ir.Value] = [arith.bitcast(f32(), bits[0])]
    if square_sum is not None:
        for distance in (16, 8, 4, 2, 1):
            square_sum = arith.addf(square_sum, utils.shfl_bfly(square_sum, distance))
        found.append(square_sum)
    return found


def _load_four(place: ir.Value, offset: int = 0) -> list[ir.Value]:
    """Four float32 from shared memory."""
    code = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
    return asm([f32()] * 4, [place], code, volatile=True)


def sum_of_squares(elements: list[ir.Value]) -> ir.Value:
    """Of float32, one after the other."""
    result = arith.mulf(elements[0], elements[0])
    for element in elements[1:]:
        result = math_ops.fma(element, element, result)
    return result


def inverse_rms(square_sum: ir.Value, width: int, eps: float) -> ir.Value:
    """1 / sqrt(square_sum / width + eps), within 2 ulp; NaN if ``square_sum`` is not finite."""
    mean_square = arith.mulf(square_sum, number(1 / width))
    (inverse,) = asm([f32()], [arith.addf(mean_square, number(eps))], "rsqrt.approx.f32 $0, $1;", volatile=False)
    return math_ops.fma(mean_square, number(0.0), inverse)


def larger(x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger number; NaN loses against any."""
    return arith.maxnumf(x, y)


def tree(combine: Any, numbers: Sequence[ir.Value]) -> ir.Value:
    """All numbers combined pairwise: the results of both halves."""
    if len(numbers) == 1:
        return numbers[0]
    middle = len(numbers) // 2
    return combine(tree(combine, numbers[:middle]), tree(combine, numbers[middle:]))
