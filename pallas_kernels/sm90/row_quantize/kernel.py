"""Rows to FP8 on Hopper: the kernel.

A thread block takes a row. It loads the row once, 8 elements (16 bytes) a thread and step, and holds it in registers;
warps reduce by shuffles, the block through shared memory; then the row is multiplied by its scale's reciprocal, cast
and stored, 8 bytes a thread and step.

How many threads a row gets (``config``):
- A whole row gets as few warpgroups as its registers fit in. Many rows then share a multiprocessor, so that one's
  loads hide another's reduction, and a single row has few partial results to wait for.
- A row of split-K partials, or of decode attention's splits, is reduced as it is loaded. It gets a thread for each 8
  elements, so that all of its parts are loaded at once.
- The parts of a few rows are many bytes for as few multiprocessors. There a cluster of blocks takes each row, with a
  thread for each 4 elements; its blocks exchange their maxima and sums of squares through shared memory.

A norm after a branch (``post_norm_quantize``) is one more such reduction, over the branch; the residual plus the
normalized branch is the row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import formats
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.memory import address, load, load_floats, offset, pack, store, unpack
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    WARPGROUP,
    absmax_scale,
    asm,
    const,
    i32,
    inlined,
    number,
    reciprocal,
    to_e4m3,
)
from pallas_kernels.sm90.common.reduction import (
    inverse_rms,
    larger,
    over_block,
    own_units,
    start_over_cluster,
    weighted,
)
from pallas_kernels.sm90.decode_attention.combine import combine_channels
from pallas_kernels.sm90.row_quantize.config import CHUNK, Config


def kernel(*refs: Any, names: tuple[str, ...], config: Config, eps: float, **scratch: Any) -> None:
    """The Pallas kernel: ``names`` are those of ``refs`` in GMEM and of ``scratch`` after them."""
    place = [lax.axis_index("row"), *([lax.axis_index("peer")] if config.cluster > 1 else [])]

    @inlined(arg_types=(*(plgpu.RefType() for _ in names), *(SCALAR for _ in place)))
    def inline(_: Any, *arguments: Any) -> None:
        memory, place = arguments[: len(names)], arguments[len(names) :]
        _quantize_row(
            dict(zip(names, memory, strict=True)), *(x.registers.item() for x in place), config=config, eps=eps
        )

    inline(*refs, *(scratch[name] for name in names[len(refs) :]), *place)


def _quantize_row(
    refs: dict[str, ir.Value], row: ir.Value, peer: ir.Value | None = None, *, config: Config, eps: float
) -> None:
    """Row ``row`` of x, or of what x is reduced from, to values and scale; normalized if there is a weight.

    Args:
        refs: in global memory, by the names of ``launch``; ``partials``, ``post_partials`` and ``arrived`` are in
            shared memory, as ``over_block`` and ``start_over_cluster`` describe them.
        row: index of the row.
        peer: index of this block in its cluster, where there is one.
        config: which threads share the row.
        eps: of the norm.
    """
    (_, width), chunk = ir.MemRefType(refs["values"].type).shape, config.chunk
    thread = utils.thread_idx()
    partials = [refs[name] for name in ("post_partials", "partials") if name in refs]
    if peer is None:
        of_block = functools.partial(over_block, warpgroups=config.warpgroups)
        over_row = [functools.partial(of_block, partials=shared) for shared in partials]
    else:
        thread = arith.addi(arith.muli(peer, const(WARPGROUP * config.warpgroups)), thread)
        with_sum = [True, "weight" in refs][-len(partials) :]
        over_row = start_over_cluster(
            partials, refs["arrived"], peer, config.warpgroups, config.cluster, with_sum=with_sum
        )
    index, inside = own_units(width // chunk, config.threads, thread)
    if "post_weight" in refs:
        loaded = _add_normalized(refs, row, index, inside, chunk, eps, over_row[0])
    elif "parts" in refs:
        loaded = [_reduce_parts(refs, row, i, chunk) for i in index]
    elif "partial" in refs:
        loaded = [pack(combine_channels(refs, row, i, chunk)) for i in index]
    else:
        start = address(refs["x"], row, 2 * width)
        loaded = [load(offset(start, i, 2 * CHUNK), i32()) for i in index]
    held = [unpack(words) for words in loaded]
    square_sum = None
    if "weight" not in refs:
        absmax = _finite_absmax([word for words in loaded for word in words])
    else:
        start = address(refs["weight"])
        factors = [load_floats(offset(start, i, 4 * chunk), chunk) for i in index]
        held, absmax, square_sum = weighted(held, factors, inside)
    absmax, square_sum = over_row[-1](absmax, square_sum)

    row_scale = absmax_scale(absmax, number(1 / formats.E4M3_MAX))
    inverse = reciprocal(row_scale)

    target = address(refs["values"], row, width)
    for i, elements in zip(index, held, strict=True):
        scaled = [arith.mulf(e, inverse) for e in elements]
        codes = [to_e4m3(scaled[j : j + 4]) for j in range(0, chunk, 4)]
        store(offset(target, i, chunk), codes)

    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, const(0))):
        if square_sum is not None:
            row_scale = arith.mulf(row_scale, inverse_rms(square_sum, width, eps))
        store(address(refs["scale"], row, 4), [row_scale])


def _reduce_parts(refs: dict[str, ir.Value], row: ir.Value, index: ir.Value, count: int) -> list[ir.Value]:
    """Write the row's ``index``-th ``count`` sums plus residual to x; returns the words of two bf16."""
    _, width = ir.MemRefType(refs["x"].type).shape
    words = split_k.load_row(refs, row, index, count)()
    store(offset(address(refs["x"], row, 2 * width), index, 2 * count), words)
    return words


def _add_normalized(
    refs: dict[str, ir.Value],
    row: ir.Value,
    index: list[ir.Value],
    inside: ir.Value | None,
    count: int,
    eps: float,
    over_row: Callable[[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value | None]],
) -> list[list[ir.Value]]:
    """Write the row's residual plus its normalized branch to x; returns the words of two bf16.

    Args:
        refs: of ``_quantize_row``.
        row: index of the row.
        index, inside: this thread's units of ``count`` elements, from ``own_units``.
        count: four or eight.
        eps: of the norm.
        over_row: reduces over the row's threads, as ``over_block`` does over a block's.
    """
    _, width = ir.MemRefType(refs["x"].type).shape

    def words(name: str) -> list[list[ir.Value]]:
        start = address(refs[name], row, 2 * width)
        return [load(offset(start, i, 2 * count), i32(), count // 2) for i in index]

    residual = words("residual")
    # Rounded to bf16 as whole rows are, so that the numbers do not depend on whether the matmul split K.
    branch = [pack(split_k.reduce(refs, row, i, count)) for i in index] if "parts" in refs else words("branch")
    factors = [load_floats(offset(address(refs["post_weight"]), i, 4 * count), count) for i in index]
    held, _, square_sum = weighted([unpack(unit) for unit in branch], factors, inside)
    _, square_sum = over_row(number(0.0), square_sum)
    assert square_sum is not None
    inverse = inverse_rms(square_sum, width, eps)
    summed = []
    for i, elements, others in zip(index, held, residual, strict=True):
        normalized = [arith.mulf(e, inverse) for e in elements]
        summed.append(pack([arith.addf(*pair) for pair in zip(normalized, unpack(others), strict=True)]))
        store(offset(address(refs["x"], row, 2 * width), i, 2 * count), summed[-1])
    return summed


def _finite_absmax(words: list[ir.Value]) -> ir.Value:
    """Largest finite magnitude among pairs of bf16, two at a time; 0 where there is none."""
    # x * 0 + x is NaN unless x is finite, and the maximum of a number and NaN is the number.
    code = """{
        .reg .b32 zero, finite;
        mov.b32 zero, 0;
        fma.rn.bf16x2 finite, $2, zero, $2;
        abs.bf16x2 finite, finite;
        max.bf16x2 $0, $1, finite;
    }"""
    absmax = const(0)
    for word in words:
        (absmax,) = asm([i32()], [absmax, word], code, volatile=False)
    return larger(*unpack([absmax]))
