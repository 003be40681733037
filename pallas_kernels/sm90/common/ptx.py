"""The pieces of device code that Pallas has no operations for: inline PTX, and MLIR's arithmetic around it.

Functions that take and return ``ir.Value`` emit code where they are called, inside a function under ``inlined``.

Register fragments follow PTX's ``wgmma``: thread ``t = 32 * warp + lane`` of a warpgroup holds, of
a 64 x M accumulator, rows ``n = 16 * warp + 8 * r + lane // 4`` (r = 0, 1) and columns
``m = 8 * j + 2 * (lane % 4) + (0, 1)``. Rows are output channels and columns are tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

WARPGROUP = 128
ROWS = plgpu.Layout.WGMMA.reduce(1)
SCALAR = plgpu.Layout.WG_SPLAT(())


def inlined(*, arg_types: tuple[Any, ...] = (), return_type: Any = None) -> Callable[..., Callable[..., Any]]:
    """``plgpu.inline_mgpu``, typed so that the decorated function is called with arrays and takes MLIR values."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def i32() -> ir.Type:
    """The type of most values here."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """The type of addresses in global memory."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """The type float32."""
    return ir.F32Type.get()


def const(value: int) -> ir.Value:
    """A 32-bit constant, 0 <= value < 2^32."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - (1 << 32) if value >= 1 << 31 else value))


def thread() -> ir.Value:
    """Index of this thread in its warpgroup."""
    return arith.andi(utils.thread_idx(), const(WARPGROUP - 1))


def fragment_position() -> tuple[ir.Value, ir.Value, ir.Value]:
    """This thread's (row for r = 0, lane % 4, warp) in a fragment."""
    index = thread()
    warp = arith.shrui(index, const(5))
    lane = arith.andi(index, const(31))
    row = arith.addi(arith.muli(warp, const(16)), arith.shrui(lane, const(2)))
    return row, arith.andi(lane, const(3)), warp


def asm(
    results: list[ir.Type], args: list[ir.Value], code: str, constraints: str | None = None, *, volatile: bool
) -> list[Any]:
    """Inline PTX: the one place that makes it.

    Args:
        results: 32-bit types, of ``$0`` and so on.
        args: 32-bit values and 64-bit addresses, numbered on after the results.
        code: PTX; more than one instruction that needs registers of its own stands in braces.
        constraints: of the operands; by their types unless given, which early clobbers ("=&r") need: results that
            are written before all arguments have been read.
        volatile: whether it must run once, where it stands: stores, barriers, loads of what others write.

    Returns:
        A value for each of ``results``.
    """
    if constraints is None:
        constraints = ",".join([*(f"={_register(ty)}" for ty in results), *(_register(arg.type) for arg in args)])
    if not results:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), args, code, constraints, has_side_effects=volatile)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], args, code, constraints, has_side_effects=volatile)]
    struct_type = llvm.StructType.get_literal(results)
    struct: Any = llvm.inline_asm(struct_type, args, code, constraints, has_side_effects=volatile)
    return [llvm.extractvalue(ty, struct, [i]) for i, ty in enumerate(results)]


def _register(ty: ir.Type) -> str:
    """The kind of register that holds a value."""
    return {"i32": "r", "i64": "l", "f32": "f"}[str(ty)]


def load_at(ref: ir.Value, index: ir.Value, element: ir.Type, result: ir.Type) -> ir.Value:
    """Load a ``result`` from ``ref``'s memory, ``index`` times the size of ``element`` from its beginning."""
    return llvm.load(result, utils.getelementptr(utils.memref_ptr(ref), [index], element))


def load_word(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Load ref[index] from GMEM (1, 2 or 4 bytes), zero-extended to 32 bits by the load itself.

    Nothing else is done to the word, so that nothing waits for it: a value that is loaded ahead must not be converted,
    or even extended, before it is used.
    """
    element = ir.MemRefType(ref.type).element_type
    bits = utils.bitwidth(element)
    pointer = utils.getelementptr(utils.memref_ptr(ref), [index], ir.IntegerType.get_signless(bits))
    address = llvm.ptrtoint(i64(), pointer)
    return asm([i32()], [address], f"ld.global.nc.b{bits} $0, [$1];", volatile=True)[0]


def to_float(word: ir.Value, bits: int) -> ir.Value:
    """A word that holds a float32, or (16 ``bits``) a bfloat16 in its low half, as float32."""
    return arith.bitcast(f32(), word if bits == 32 else arith.shli(word, const(16)))


def element(vec: ir.Value, i: int) -> ir.Value:
    """The i-th element of a vector."""
    return vector.extract(vec, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def number(value: float) -> ir.Value:
    """A float32 constant."""
    return arith.constant(f32(), ir.FloatAttr.get(f32(), value))


def reciprocal(x: ir.Value) -> ir.Value:
    """1 / x of a float32, rounded to nearest."""
    return asm([f32()], [x], "rcp.rn.f32 $0, $1;", volatile=False)[0]


def absmax_scale(absmax: ir.Value, factor: ir.Value) -> ir.Value:
    """``formats.absmax_scale``; ``factor`` is the limit's reciprocal."""
    scale = arith.mulf(absmax, factor)
    normal = arith.cmpf(arith.CmpFPredicate.OGE, scale, number(float(np.finfo(np.float32).tiny)))
    return arith.select(normal, scale, number(1.0))


def to_e4m3(elements: Sequence[ir.Value]) -> ir.Value:
    """Four float32 -> one word of E4M3, the first in the lowest byte; saturating."""
    # A conversion puts its first operand in the upper byte.
    code = """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
    }"""
    return asm([i32()], list(elements), code, volatile=False)[0]


def shared_address(ref: ir.Value) -> ir.Value:
    """Address of ref in shared memory, in 32 bits as PTX takes it."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def clamped_index(ref: ir.Value, i: ir.Value, j: ir.Value) -> ir.Value:
    """Index of element (i, j) of a row-major matrix, with i and j clamped to its last row and column."""
    rows, columns = ir.MemRefType(ref.type).shape
    i, j = arith.minsi(i, const(rows - 1)), arith.minsi(j, const(columns - 1))
    return arith.addi(arith.muli(i, const(columns)), j)


def raw_array(words: list[ir.Value], layout: Any, shape: tuple[int, ...] | None = None) -> mgpu.FragmentedArray:
    """32-bit words as an int32 array of ``layout`` (and ``shape``, where the layout does not have one)."""
    fragments = layout.to_mgpu()
    one_word = ir.VectorType.get((1,), i32())
    registers = np.array([vector.broadcast(one_word, word) for word in words], object)
    if shape is not None:
        registers = registers.reshape(fragments.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=fragments, _is_signed=True)
