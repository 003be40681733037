"""The inputs of a chain's links: rows written to shared memory as WGMMA's FP8 operand, by all consumers of a block.

A block holds ``columns`` of a row's columns from ``first`` on, wrapping round at the row's end. In shared memory each
128 of them are a tile of eight rows of 128 bytes, whose 16-byte pieces the 128-byte swizzle permutes. Rows past the
last token are not written: they become columns of the output that nobody reads.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.experimental.pallas as pl
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import formats, layouts
from pallas_kernels.sm90.chain.barriers import emit_barrier
from pallas_kernels.sm90.chain.schedule import CHUNK_K, THREADS, TILE_M, WARPGROUPS
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.memory import address, load, load_floats, offset, store, unpack, wide
from pallas_kernels.sm90.common.ptx import (
    absmax_scale,
    asm,
    const,
    f32,
    i32,
    number,
    reciprocal,
    shared_address,
    to_e4m3,
)
from pallas_kernels.sm90.common.reduction import inverse_rms, over_block, own_units, weighted
from pallas_kernels.sm90.common.split_k import EIGHT

Refs = Mapping[str, ir.Value]

WARPS = THREADS // 32
# Units of eight elements, of all rows, that a thread loads at once.
UNITS = 4


def copy_rows(refs: Refs, first: ir.Value, columns: int, after_loads: Callable[[], None]) -> None:
    """FP8 rows ``x`` [M, K] with their scales ``x_scale`` [M].

    Args:
        refs: these in global memory; in shared memory ``tile`` and, for the scales, ``tokens``.
        first: column, a multiple of 128.
        columns: how many the block holds.
        after_loads: called between the loads and what waits for them.
    """
    m, k = ir.MemRefType(refs["x"].type).shape
    spread, loaded = _spread(m, columns // 16), []
    for row, unit in spread:
        column, inside = _column(first, unit, 16, k)
        loaded.append((inside, load(arith.addi(address(refs["x"], row, k), wide(column)), i32())))
    after_loads()
    for (row, unit), (inside, words) in zip(spread, loaded, strict=True):
        words = [arith.select(inside, word, const(0)) for word in words]
        place = _place(refs["tile"], row, arith.muli(unit, const(16)))
        asm([], [place, *words], "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", volatile=True)
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, utils.thread_idx(), const(m))):
        (scale,) = load(address(refs["x_scale"], utils.thread_idx(), 4), f32(), 1)
        _store_scale(refs["tokens"], utils.thread_idx(), scale)


def quantize_hidden(refs: Refs, first: ir.Value, columns: int, blocks: int, leader: ir.Value) -> None:
    """bf16 rows ``hidden`` [M, K] to FP8, with the ``absmax`` [blocks, TILE_M] that each block found of its columns.

    Args:
        refs: these in global memory and ``scale`` [M], which the leader writes; ``tile`` and ``tokens``
            in shared memory.
        first: column, a multiple of 128.
        columns: how many the block holds.
        blocks: that wrote an absmax.
        leader: whether this is the block that writes the scales.
    """
    m, k = ir.MemRefType(refs["hidden"].type).shape
    thread = utils.thread_idx()
    spread = _spread(m, columns // EIGHT)
    batches = [spread[i : i + 2 * UNITS] for i in range(0, len(spread), 2 * UNITS)]

    def loaded(batch: list[tuple[ir.Value, ir.Value]]) -> list[tuple[ir.Value, list[ir.Value]]]:
        words = []
        for row, unit in batch:
            column, inside = _column(first, unit, EIGHT, k)
            start = arith.addi(address(refs["hidden"], row, 2 * k), wide(arith.muli(column, const(2))))
            words.append((inside, load(start, i32(), written=True)))
        return words

    ahead = loaded(batches[0])
    # A warp reduces a token's absmax over the blocks; warps past the last token repeat it.
    token = arith.minui(arith.shrui(thread, const(5)), const(m - 1))
    lane = arith.andi(thread, const(31))
    found = []
    for start in range(0, blocks, 32):
        block = arith.minui(arith.addi(lane, const(start)), const(blocks - 1))
        place = offset(address(refs["absmax"]), arith.addi(arith.muli(block, const(TILE_M)), token), 4)
        found += load(place, i32(), 1, written=True)
    absmax = functools.reduce(arith.maxui, found)
    (absmax,) = asm([i32()], [absmax], "redux.sync.max.u32 $0, $1, 0xffffffff;", volatile=True)
    scale = absmax_scale(arith.bitcast(f32(), absmax), number(1 / formats.E4M3_MAX))
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, const(0))):
        _store_scale(refs["tokens"], token, scale)
        with utils.when(leader):
            store(address(refs["scale"], token, 4), [scale])
    emit_barrier()
    for i, batch in enumerate(batches):
        for (row, unit), (inside, words) in zip(batch, ahead if i == 0 else loaded(batch), strict=True):
            words = [arith.select(inside, word, const(0)) for word in words]
            place = arith.addi(shared_address(refs["tokens"]), arith.muli(row, const(4)))
            (scale,) = asm([f32()], [place], "ld.shared.f32 $0, [$1];", volatile=True)
            _store_codes(refs["tile"], row, unit, unpack(words), reciprocal(scale))


def norm_rows(refs: Refs, eps: float, leader: ir.Value, after_loads: Callable[[], None], *, written: bool) -> None:
    """RMSNorm of all columns of ``residual`` [M, D], plus the sum of split-K partials where there are ``parts``.

    Args:
        refs: in global memory ``residual``, ``weight`` float32 [D], ``split_k.operands``, and for the leader to
            write ``x`` [M, D] (where there are parts) and ``scale`` [M]; ``tile``, ``tokens`` and ``partials``,
            float32 [UNITS * 2 * WARPS], in shared memory.
        eps: of the norm.
        leader: whether this is the block that writes x and the scales.
        after_loads: called between the first rows' loads and what waits for them.
        written: whether this kernel wrote the parts.
    """
    m, width = ir.MemRefType(refs["residual"].type).shape
    index, inside = own_units(width // EIGHT, THREADS)
    factors = [load_floats(offset(address(refs["weight"]), i, 4 * EIGHT), EIGHT) for i in index]
    at_once = max(1, UNITS // len(index))
    for start in range(0, m, at_once):
        rows = [const(row) for row in range(start, min(start + at_once, m))]
        loaded = [[split_k.load_row(refs, row, i, written=written) for i in index] for row in rows]
        if start == 0:
            after_loads()
        for n, (row, units) in enumerate(zip(rows, loaded, strict=True)):
            words = [reduce() for reduce in units]
            if "parts" in refs:
                with utils.when(leader):
                    for i, four in zip(index, words, strict=True):
                        store(offset(address(refs["x"], row, 2 * width), i, 2 * EIGHT), four)
            scaled, absmax, square_sum = weighted([unpack(four) for four in words], factors, inside)
            # Rows take turns at the buffers, so that none writes where a slower warp still reads the row before.
            turn = 2 * WARPS * ((start + n) % UNITS)
            partials = utils.memref_slice(refs["partials"], slice(turn, turn + 2 * WARPS))
            absmax, square_sum = over_block(absmax, square_sum, partials, WARPGROUPS, emit_barrier)
            assert square_sum is not None
            scale = absmax_scale(absmax, number(1 / formats.E4M3_MAX))
            for i, elements in zip(index, scaled, strict=True):
                _store_codes(refs["tile"], row, i, elements, reciprocal(scale))
            scale = arith.mulf(scale, inverse_rms(square_sum, width, eps))
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), const(0))):
                _store_scale(refs["tokens"], row, scale)
                with utils.when(leader):
                    store(address(refs["scale"], row, 4), [scale])


def _spread(m: int, units: int) -> list[tuple[ir.Value, ir.Value]]:
    """(row, unit) pairs of this thread among ``units`` of each row; threads past the last pair repeat it."""
    result = []
    for start in range(0, m * units, THREADS):
        index = arith.addi(utils.thread_idx(), const(start))
        index = arith.minui(index, const(m * units - 1))
        result.append((arith.divui(index, const(units)), arith.remui(index, const(units))))
    return result


def _column(first: ir.Value, unit: ir.Value, size: int, k: int) -> tuple[ir.Value, ir.Value]:
    """Where a unit begins in its row of k columns, and whether it lies in the row; 0 if it does not."""
    padded = pl.cdiv(k, CHUNK_K) * CHUNK_K
    column = arith.remui(arith.addi(first, arith.muli(unit, const(size))), const(padded))
    inside = arith.cmpi(arith.CmpIPredicate.ult, column, const(k))
    return arith.select(inside, column, const(0)), inside


def _place(tile: ir.Value, row: ir.Value, column: ir.Value) -> ir.Value:
    """Address in shared memory of a row's held ``column``, a multiple of eight."""
    within = arith.andi(column, const(layouts.TILE_K - 1))
    piece = arith.xori(arith.shrui(within, const(4)), row)
    parts = (
        shared_address(tile),
        arith.muli(arith.shrui(column, const(7)), const(TILE_M * layouts.TILE_K)),
        arith.muli(row, const(layouts.TILE_K)),
        arith.shli(piece, const(4)),
        arith.andi(column, const(8)),
    )
    return functools.reduce(arith.addi, parts)


def _store_codes(
    tile: ir.Value, row: ir.Value, unit: ir.Value, elements: Sequence[ir.Value], inverse: ir.Value
) -> None:
    """Store eight numbers times ``inverse`` in FP8, as a row's ``unit``-th eight held columns."""
    scaled = [arith.mulf(e, inverse) for e in elements]
    codes = [to_e4m3(scaled[j : j + 4]) for j in range(0, EIGHT, 4)]
    place = _place(tile, row, arith.muli(unit, const(EIGHT)))
    asm([], [place, *codes], "st.shared.v2.b32 [$0], {$1, $2};", volatile=True)


def _store_scale(tokens: ir.Value, token: ir.Value, scale: ir.Value) -> None:
    place = arith.addi(shared_address(tokens), arith.muli(token, const(4)))
    asm([], [place, scale], "st.shared.f32 [$0], $1;", volatile=True)
