"""Register-level quantization of a row that a few lanes share, and the instructions for it.

Nothing is rounded by a rule of its own: scales, E4M3 and INT4 follow ``formats``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.sm90.common import reduction
from pallas_kernels.sm90.common.memory import unpack
from pallas_kernels.sm90.common.ptx import asm, const, f32, i32, number, reciprocal
from pallas_kernels.sm90.common.reduction import tree


class Row(NamedTuple):
    """A lane's part of a row: elements i and i + H/2, as many of each."""

    low: Sequence[ir.Value]
    high: Sequence[ir.Value]

    @property
    def elements(self) -> list[ir.Value]:
        return [*self.low, *self.high]

    def map(self, function: Callable[..., ir.Value], *others: "Row") -> "Row":
        """``function`` of each element and its like in ``others``."""
        return Row(*(list(map(function, *halves)) for halves in zip(self, *others, strict=True)))


@contextlib.contextmanager
def when(condition: ir.Value) -> Iterator[None]:
    """What is emitted inside runs only where ``condition`` holds."""
    with ir.InsertionPoint(scf.IfOp(condition).then_block):
        yield
        scf.yield_([])


def choose(
    condition: ir.Value,
    then: Callable[[], Sequence[ir.Value]],
    otherwise: Callable[[], Sequence[ir.Value]],
    count: int = 0,
) -> list[ir.Value]:
    """The ``count`` float32 of whichever function's code ``condition`` selects."""
    branch = scf.IfOp(condition, [f32()] * count, has_else=True)
    for block, emit in ((branch.then_block, then), (branch.else_block, otherwise)):
        assert block is not None
        with ir.InsertionPoint(block):
            scf.yield_(emit())
    return list(branch.results)


def true() -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(1), 1)


def less(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ult, x, y)


def fma(x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return llvm.intr_fma(x, y, z)


def store(address: ir.Value, words: Sequence[ir.Value], condition: ir.Value, bits: int = 32) -> None:
    """One word (or its low 16 bits) or two, where ``condition`` holds."""
    operands = [address, *words, arith.extui(i32(), condition)]
    predicate = f"{{ .reg .pred p; setp.ne.b32 p, ${len(words) + 1}, 0; "
    if bits == 16:
        code = ".reg .b16 low, high; mov.b32 {low, high}, $1; @p st.global.b16 [$0], low; }"
    elif len(words) == 1:
        code = "@p st.global.b32 [$0], $1; }"
    else:
        code = "@p st.global.v2.b32 [$0], {$1, $2}; }"
    asm([], operands, predicate + code, ",".join(["l", *("r" for _ in operands[1:])]), volatile=True)


def unpacked(words: Sequence[ir.Value]) -> Row:
    """float32 of two bf16 a word, as many words of each half."""
    middle = len(words) // 2
    return Row(unpack(words[:middle]), unpack(words[middle:]))


def to_bf16(x: ir.Value) -> ir.Value:
    """A positive float32 rounded to bf16, never to 0, as a word: ``formats.round_group_scale``."""
    code = "{ .reg .b16 low, zero; cvt.rn.bf16.f32 low, $1; mov.b16 zero, 0; mov.b32 $0, {low, zero}; }"
    [word] = asm([i32()], [x], code, "=r,f", volatile=False)
    tiny = const(0x0080)  # the smallest normal bf16
    return arith.select(arith.cmpi(arith.CmpIPredicate.eq, word, const(0)), tiny, word)


def from_bf16(word: ir.Value) -> ir.Value:
    """float32 of the bf16 in a word's low half."""
    return arith.bitcast(f32(), arith.shli(word, const(16)))


def finite_absmax(row: Row, lanes: int) -> ir.Value:
    """``formats.finite_absmax`` of a row that ``lanes`` neighbouring lanes share."""
    # Four chains, which do not wait for each other.
    chains = [functools.reduce(_larger_if_finite, row.elements[i::4], number(0.0)) for i in range(4)]
    return _over_lanes(arith.maxnumf, tree(arith.maxnumf, chains), lanes)


def sum_of_squares(row: Row, lanes: int) -> ir.Value:
    """Of a row that ``lanes`` neighbouring lanes share, in an order that does not depend on how many pairs each has."""
    quads = [[*row.low[i : i + 4], *row.high[i : i + 4]] for i in range(0, len(row.low), 4)]
    total = tree(arith.addf, [reduction.sum_of_squares(quad) for quad in quads])
    distance = 1
    while distance < lanes:
        total = arith.addf(total, utils.shfl_bfly(total, distance))
        distance *= 2
    return total


def energy_over_kept(row: Row, lanes: int) -> ir.Value:
    """x . x over x . codes for a row x that was divided by its scale: ``formats.quantize_kv``'s ``unbiased``."""
    energy, kept = number(0.0), number(0.0)
    for x in row.elements:
        magnitude = _larger_if_finite(number(0.0), x)
        energy = fma(magnitude, magnitude, energy)
        kept = fma(magnitude, _rounded(magnitude), kept)
    energy, kept = (_over_lanes(arith.addf, x, lanes) for x in (energy, kept))
    positive = arith.cmpf(arith.CmpFPredicate.OGT, kept, number(0.0))
    ratio = arith.divf(energy, arith.select(positive, kept, number(1.0)))
    return arith.select(positive, ratio, number(1.0))


def _over_lanes(combine: Callable[[ir.Value, ir.Value], ir.Value], x: ir.Value, lanes: int) -> ir.Value:
    """``combine`` of ``lanes`` neighbouring lanes' numbers, in all of them."""
    distance = lanes // 2
    while distance:
        x = combine(x, utils.shfl_bfly(x, distance))
        distance //= 2
    return x


def _larger_if_finite(largest: ir.Value, x: ir.Value) -> ir.Value:
    """max(largest, |x|); x * 0 + x is NaN for an infinity, and the maximum passes over NaN."""
    code = "{ .reg .f32 y; fma.rn.f32 y, $2, 0f00000000, $2; abs.f32 y, y; max.f32 $0, $1, y; }"
    return asm([f32()], [largest, x], code, "=f,f,f", volatile=False)[0]


def reciprocals(row: Row) -> Row:
    """1 / x of each element, as ``reciprocal``, but with one branch for all where that has one for each.

    The hardware's reciprocal and a Newton step are rounded to nearest for 2^-126 <= |x| < 2^126.
    """

    def quick(x: ir.Value) -> ir.Value:
        [inverse] = asm([f32()], [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f", volatile=False)
        return fma(inverse, fma(arith.negf(x), inverse, number(1.0)), inverse)

    bits = [arith.andi(arith.bitcast(i32(), x), const(0x7FFFFFFF)) for x in row.elements]
    farthest = tree(arith.maxui, [arith.subi(x, const(0x00800000)) for x in bits])
    elements = choose(
        less(farthest, const(0x7E000000)),
        lambda: [quick(x) for x in row.elements],
        lambda: [reciprocal(x) for x in row.elements],
        len(row.elements),
    )
    return Row(elements[: len(row.low)], elements[len(row.low) :])


def quotients(row: Row, scale: ir.Value) -> Row:
    """Elements over ``scale``: times its reciprocal, as ``formats`` divides."""
    inverse = reciprocal(scale)
    return row.map(lambda x: arith.mulf(x, inverse))


def to_int4(low: Sequence[ir.Value], high: Sequence[ir.Value]) -> ir.Value:
    """Four bytes of ``formats.pack_int4`` from four elements of each half."""
    signs = [_gather_bytes([arith.bitcast(i32(), x) for x in half], 3) for half in (low, high)]
    low_magnitude, high_magnitude = (_gather_bytes([_magnitude(x) for x in half], 0) for half in (low, high))
    # Code 0 has no sign: adding 7 brings the other magnitudes to the top bit of a nibble, here of the sign's.
    nonzero = arith.addi(arith.ori(high_magnitude, arith.shli(low_magnitude, const(4))), const(0x77777777))
    sign = arith.ori(
        arith.andi(signs[0], const(0x80808080)), arith.andi(arith.shrui(signs[1], const(4)), const(0x08080808))
    )
    return arith.ori(arith.ori(low_magnitude, arith.shli(high_magnitude, const(4))), arith.andi(sign, nonzero))


def _magnitude(x: ir.Value) -> ir.Value:
    """|x| rounded to nearest even and at most 7, in the low byte; 0 for NaN, which saturation flushes."""
    return arith.bitcast(i32(), _above_2_23(x))


def _rounded(x: ir.Value) -> ir.Value:
    """The same as float32."""
    return arith.subf(_above_2_23(x), number(2.0**23))


def _above_2_23(x: ir.Value) -> ir.Value:
    """2^23 + |x|, where float32 has no fractions: rounded to nearest even; |x| is at most 7, NaN is 0."""
    code = (
        "{ .reg .f32 a; abs.f32 a, $1; mul.rn.sat.f32 a, a, 0f3E000000; min.f32 a, a, 0f3F600000; "  # / 8, 7 / 8
        "fma.rn.f32 $0, a, 0f41000000, 0f4B000000; }"  # * 8 + 2^23
    )
    return asm([f32()], [x], code, "=f,f", volatile=False)[0]


def _gather_bytes(four: Sequence[ir.Value], byte: int) -> ir.Value:
    """Byte ``byte`` of each of four words, in order."""
    first, second = (utils.prmt(four[i], four[i + 1], const(0x40 + 0x11 * byte)) for i in (0, 2))
    return utils.prmt(first, second, const(0x5410))
