"""What decode attention's thread blocks leave of a sequence's splits, combined: a kernel, and device code for others.

A split's output is float32 and unnormalized, relative to the highest score it has seen: ``partial``
[B, kv_heads, splits, 1, rows, H], ``row_max`` and ``row_sum`` [B, kv_heads, splits, rows], of which device code
may be passed the last axes of one kv head. A row is a token and one of the kv head's ``group`` query heads.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.common.ptx import SCALAR, const, number
from pallas_kernels.sm90.common.ptx import element as element_of


def combine_splits(
    partial: Float[Array, "B kv_heads splits 1 rows H"],
    row_max: Float[Array, "B kv_heads splits rows"],
    row_sum: Float[Array, "B kv_heads splits rows"],
    *,
    out_type: jax.ShapeDtypeStruct,
) -> Float[Array, "B T heads H"]:
    """The output, of ``out_type``, from that of the splits as the kernel leaves it."""
    batch, kv_heads, _, _, rows, head_dim = partial.shape
    return plgpu.kernel(
        functools.partial(_combine_kernel, group=out_type.shape[2] // kv_heads),
        out_type=out_type,
        grid=(pl.cdiv(rows * head_dim, 4 * 128), kv_heads, batch),
        grid_names=("block", "head", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="combine_splits",
    )(partial, row_max, row_sum)


def _combine_kernel(partial_gmem, row_max_gmem, row_sum_gmem, out_gmem, *, group: int) -> None:
    """One block: 128 x 4 numbers of the output of one kv head, from the partial ones of all splits."""
    batch, kv_head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    where = (batch, kv_head)
    run = functools.partial(combine_head, group=group)
    types = (SCALAR, SCALAR, *(plgpu.RefType(),) * 4)
    refs = (
        partial_gmem.at[(*where, slice(None), 0)],
        row_max_gmem.at[where],
        row_sum_gmem.at[where],
        out_gmem.at[batch],
    )
    plgpu.inline_mgpu(arg_types=types)(run)(block, kv_head * group, *refs)


def combine_head(
    _: mgpu.LaunchContext,
    block: mgpu.FragmentedArray,
    first_head: mgpu.FragmentedArray,
    partial: ir.Value,
    row_max: ir.Value,
    row_sum: ir.Value,
    target: ir.Value,
    *,
    group: int,
) -> None:
    """Output of one kv head, the heads from ``first_head`` on of ``target`` [T, heads, H].

    Each of a block's 128 threads makes four channels.
    """
    rows, head_dim = ir.MemRefType(partial.type).shape[-2:]
    heads = ir.MemRefType(target.type).shape[1]
    element = ir.MemRefType(target.type).element_type
    unit_index = arith.addi(arith.muli(block.registers.item(), const(128)), arith.remui(utils.thread_idx(), const(128)))
    row = arith.divui(unit_index, const(head_dim // 4))
    channel = arith.muli(arith.remui(unit_index, const(head_dim // 4)), const(4))
    inside = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, row, const(rows)))
    with ir.InsertionPoint(inside.then_block):
        values = _combined(partial, row_max, row_sum, row, channel, 4)
        if element != ir.F32Type.get():
            values = [arith.truncf(element, value) for value in values]
        head = arith.addi(arith.remui(row, const(group)), first_head.registers.item())
        index = arith.addi(arith.muli(arith.divui(row, const(group)), const(heads)), head)
        index = arith.addi(arith.muli(index, const(head_dim)), channel)
        pointer = utils.getelementptr(utils.memref_ptr(target), [index], element)
        together = vector.from_elements(ir.VectorType.get((4,), element), values)
        llvm.store(together, pointer, alignment=utils.bitwidth(element) // 2)
        scf.YieldOp([])


def combine_channels(refs: Mapping[str, ir.Value], token: ir.Value, index: ir.Value, count: int) -> list[ir.Value]:
    """The ``index``-th ``count`` of a token's channels, four or eight, float32.

    Args:
        refs: the three sources whole, and ``values`` [B * T, heads * H] for its shape.
        token: which of all sequences'.
        index: counts them.
        count: of a head's channels.
    """
    partial, row_max, row_sum = (refs[name] for name in ("partial", "row_max", "row_sum"))
    _, kv_heads, splits, rows = ir.MemRefType(row_max.type).shape
    head_dim, (_, width) = ir.MemRefType(partial.type).shape[-1], ir.MemRefType(refs["values"].type).shape
    group, units = width // (kv_heads * head_dim), head_dim // count
    length = rows // group
    head, unit = arith.divui(index, const(units)), arith.remui(index, const(units))
    batch, query = arith.divui(token, const(length)), arith.remui(token, const(length))
    kv_head = arith.addi(arith.muli(batch, const(kv_heads)), arith.divui(head, const(group)))
    row = arith.addi(arith.muli(query, const(group)), arith.remui(head, const(group)))
    first = arith.addi(arith.muli(kv_head, const(splits * rows)), row)
    return _combined(partial, row_max, row_sum, first, arith.muli(unit, const(count)), count)


def _combined(
    partial: ir.Value, row_max: ir.Value, row_sum: ir.Value, first: ir.Value, channel: ir.Value, count: int
) -> list[ir.Value]:
    """``count`` channels, a multiple of 4, from ``channel`` on, of the row that is ``first`` in the first split."""
    splits, rows = ir.MemRefType(row_max.type).shape[-2:]
    head_dim, f32 = ir.MemRefType(partial.type).shape[-1], ir.F32Type.get()

    def load(ref: ir.Value, index: ir.Value, result: ir.Type) -> ir.Value:
        return llvm.load(result, utils.getelementptr(utils.memref_ptr(ref), [index], f32))

    at = [arith.addi(first, const(split * rows)) for split in range(splits)]
    maxima, sums = ([load(ref, index, f32) for index in at] for ref in (row_max, row_sum))
    highest = functools.reduce(arith.maximumf, maxima)
    zero = number(0.0)
    highest = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, highest, number(-math.inf)), zero, highest)
    denominator, summed = zero, [zero] * count
    for index, own_max, own_sum in zip(at, maxima, sums, strict=True):
        weight = _exp2(arith.subf(own_max, highest))
        start = arith.addi(arith.muli(index, const(head_dim)), channel)
        quads = [load(partial, arith.addi(start, const(i)), ir.VectorType.get((4,), f32)) for i in range(0, count, 4)]
        own = [element_of(quad, i) for quad in quads for i in range(4)]
        denominator = arith.addf(denominator, arith.mulf(weight, own_sum))
        summed = [arith.addf(x, arith.mulf(weight, y)) for x, y in zip(summed, own, strict=True)]
    positive = arith.cmpf(arith.CmpFPredicate.OGT, denominator, zero)
    unit = number(1.0 / (formats.PROBABILITY_SCALE * CODE_UNIT))
    inverse = arith.divf(unit, arith.select(positive, denominator, number(1.0)))
    inverse = arith.select(positive, inverse, zero)
    return [arith.mulf(x, inverse) for x in summed]


def _exp2(x: ir.Value) -> ir.Value:
    f32 = ir.F32Type.get()
    result = llvm.inline_asm(f32, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")
    assert isinstance(result, ir.Value)
    return result
