"""A row over the threads of a block: who has which columns, and what they find out together."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu
from jaxlib.mlir.dialects import math as math_ops

from pallas_kernels.sm90.inline import asm, const, f32, i32, number, shared_address


def own_units(units: int, threads: int) -> tuple[list[ir.Value], ir.Value | None]:
    """Which of a row's ``units`` this thread has, and whether the last is its own; None where all threads' are.

    Threads beyond the row's end do the last unit once more; only a sum must not count it.
    """
    steps = -(-units // threads)
    index: list[ir.Value] = [arith.addi(utils.thread_idx(), const(step * threads)) for step in range(steps)]
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
    # Floats that are not negative order as their bits do.
    bits = asm([i32()], [largest], "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,f", volatile=True)
    found = [arith.bitcast(f32(), bits[0])]
    if total is not None:
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        found.append(total)
    shared = shared_address(partials)
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, const(31)), const(0))):
        place = arith.addi(shared, arith.muli(arith.shrui(thread, const(5)), const(4)))
        for i, number in enumerate(found):
            asm([], [place, number], f"st.shared.f32 [$0 + {4 * warps * i}], $1;", "r,f", volatile=True)
    barrier()
    results = []
    for i, combine in zip(range(len(found)), (larger, arith.addf), strict=False):
        numbers = []
        for warp in range(0, warps, 4):
            code = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {4 * (warps * i + warp)}];"
            numbers += asm([f32()] * 4, [shared], code, "=f,=f,=f,=f,r", volatile=True)
        results.append(tree(combine, numbers))
    return results[0], results[1] if total is not None else None


def sum_of_squares(elements: list[ir.Value]) -> ir.Value:
    """Of float32, one after the other."""
    total = arith.mulf(elements[0], elements[0])
    for element in elements[1:]:
        total = math_ops.fma(element, element, total)
    return total


def inverse_rms(total: ir.Value, width: int, eps: float) -> ir.Value:
    """1 / sqrt(total / width + eps), within 2 ulp; NaN if ``total`` is not finite."""
    mean_square = arith.mulf(total, number(1 / width))
    (inverse,) = asm(
        [f32()], [arith.addf(mean_square, number(eps))], "rsqrt.approx.f32 $0, $1;", "=f,f", volatile=False
    )
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
