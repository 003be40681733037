"""Loads and stores of rows in global memory, up to 16 bytes at a time, and words of two bf16."""

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.sm90.common.ptx import asm, const, f32, i32, i64


def address(ref: ir.Value, row: ir.Value | None = None, row_bytes: int = 0) -> ir.Value:
    """Address of row ``row`` of ``ref``, in 64 bits: a large array has more than 2^32 bytes."""
    start = llvm.ptrtoint(i64(), utils.memref_ptr(ref))
    return start if row is None else offset(start, row, row_bytes)


def offset(start: ir.Value, index: ir.Value, size: int) -> ir.Value:
    """start + index * size, in bytes; ``index`` has 32 or 64 bits."""
    return arith.addi(start, arith.muli(wide(index), arith.constant(i64(), ir.IntegerAttr.get(i64(), size))))


def wide(x: ir.Value) -> ir.Value:
    """An unsigned number as 64 bits."""
    return x if x.type == i64() else arith.extui(i64(), x)


def load(
    address: ir.Value, element: ir.Type, count: int = 4, offset: int = 0, *, written: bool = False
) -> list[ir.Value]:
    """Load one, two or four 32-bit numbers. Loads keep their order, so that the compiler does not delay any.

    Args:
        address: of the first, less ``offset``.
        element: their type.
        count: how many.
        offset: in bytes.
        written: whether this kernel writes that memory; if not, loads take the path of read-only data.
    """
    kind = "f32" if element == f32() else "b32"
    space = "global" if written else "global.nc"
    if count == 1:
        return asm([element], [address], f"ld.{space}.{kind} $0, [$1 + {offset}];", volatile=True)
    assert count in (2, 4)
    results = ", ".join(f"${i}" for i in range(count))
    code = f"ld.{space}.v{count}.{kind} {{{results}}}, [${count} + {offset}];"
    return asm([element] * count, [address], code, volatile=True)


def load_floats(address: ir.Value, count: int, offset: int = 0, *, written: bool = False) -> list[ir.Value]:
    """Load ``count`` float32, a multiple of four."""
    places = range(offset, offset + 4 * count, 16)
    return [number for at in places for number in load(address, f32(), offset=at, written=written)]


def store(address: ir.Value, numbers: Sequence[ir.Value]) -> None:
    """Store one, two or four 32-bit numbers of one type."""
    kind = "f32" if numbers[0].type == f32() else "b32"
    values = ", ".join(f"${i + 1}" for i in range(len(numbers)))
    vector, values = ("", values) if len(numbers) == 1 else (f".v{len(numbers)}", f"{{{values}}}")
    code = f"st.global{vector}.{kind} [$0], {values};"
    asm([], [address, *numbers], code, volatile=True)


def unpack(words: Sequence[ir.Value]) -> list[ir.Value]:
    """Words of two bf16 as float32, the low half first."""
    halves = [half for word in words for half in (arith.shli(word, const(16)), arith.andi(word, const(0xFFFF0000)))]
    return [arith.bitcast(f32(), half) for half in halves]


def pack(elements: Sequence[ir.Value]) -> list[ir.Value]:
    """The inverse of ``unpack``; rounds to nearest even."""
    pairs = zip(elements[::2], elements[1::2], strict=True)
    code = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return [asm([i32()], [low, high], code, volatile=False)[0] for low, high in pairs]
