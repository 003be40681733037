"""Device code of the prefill kernels; ``prefill`` describes them and launches them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.sm90.attention import prefill_registers as registers
from pallas_kernels.sm90.attention.decode_device import swizzle
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.attention.schedule import Schedule

BLOCK_Q = 64  # queries of a warpgroup: WGMMA's M
PRODUCT_KEYS = 64  # of a product P V where a tile's are two, and so the width of V's swizzled tiles
_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each query
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each key
_SCALAR = plgpu.Layout.WG_SPLAT(())
WARPGROUPS = 2  # that compute, of a block; a third leaves each too few registers
# log2 of how far a tile's unit may lie below the largest: what was summed before grows by as much.
_PEAK_RANGE = 32.0
# Registers a thread: the copying warpgroup gives what it does not need to the computing ones.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240


def prepare_kernel(
    k_gmem, k_scale_gmem, v_gmem, v_scale_gmem, kv_lengths_gmem, keys_gmem, values_gmem, columns_gmem,
) -> None:  # fmt: skip
    """One block: ``PREPARED_TOKENS`` tokens of one kv head as :func:`kernel`'s operands."""
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    first = lax.axis_index("block") * registers.PREPARED_TOKENS
    ref = plgpu.RefType()

    def own(*refs):
        return (x.at[batch, kv_head] for x in refs)

    columns = functools.partial(registers.prepare_columns, sum_columns=values_gmem.shape[2] > keys_gmem.shape[3])
    plgpu.inline_mgpu(arg_types=(_SCALAR, _SCALAR, *(ref,) * 4))(columns)(
        first, kv_lengths_gmem[batch], *own(k_scale_gmem, v_scale_gmem, columns_gmem, values_gmem)
    )
    codes = plgpu.inline_mgpu(arg_types=(_SCALAR, ref, ref))
    codes(registers.prepare_keys)(first, *own(k_gmem, keys_gmem))
    codes(registers.prepare_values)(first, *own(v_gmem, values_gmem))


def kernel(
    q_gmem,
    q_scale_gmem,
    k_gmem,
    v_gmem,
    columns_gmem,
    query_start_gmem,
    kv_lengths_gmem,
    *refs,
    q_smem,
    out_smem,
    k_smem,
    v_smem,
    columns_smem,
    q_full,
    q_free,
    full,
    free,
    turns,
    schedule: Schedule,
    to_scores: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    pipeline: int,
) -> None:
    """One thread block: its share of the blocks of ``WARPGROUPS`` x 64 queries of one head."""
    *sinks_gmem, out_gmem = refs
    stages, block_kv, _ = k_smem.shape
    block_rows = BLOCK_Q * WARPGROUPS
    batches, length, heads, _ = out_gmem.shape
    row_blocks = -(-length // block_rows)
    group = heads // k_gmem.shape[1]
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    count = schedule.visits(cta)

    def block(i) -> _Block:
        """This thread block's i-th. Heads that share keys are neighbours, and the longest come first."""
        index = schedule.visited(cta, jnp.minimum(i, count - 1))
        rest, head = lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads))
        batch = lax.rem(rest, jnp.int32(batches))
        # The last queries see the most keys.
        first_row = (row_blocks - 1 - lax.div(rest, jnp.int32(batches))) * block_rows
        return _Block(batch, head, first_row, query_start_gmem[batch], kv_lengths_gmem[batch])

    def tile_range(block: _Block):
        """The first tile that a query of the block sees, the first that not all see, and the end."""
        end_slot = jnp.minimum(block.length, block.position + block_rows) if causal else block.length
        end = pl.cdiv(end_slot, jnp.int32(block_kv))
        begin = jnp.int32(0)
        if window is not None:
            begin = lax.div(jnp.maximum(block.position - (window - 1), 0), jnp.int32(block_kv))
        begin = jnp.minimum(begin, end)
        full_slots = jnp.minimum(block.length, block.position + 1) if causal else block.length
        full_end = jnp.clip(lax.div(full_slots, jnp.int32(block_kv)), begin, end) if window is None else begin
        return begin, full_end, end

    def stage(number):
        return lax.rem(number, jnp.int32(stages))

    @pl.when(warpgroup == WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        def visit(i, done):
            now = block(i)
            kv_head = lax.div(now.head, jnp.int32(group))
            begin, _, end = tile_range(now)
            for w in range(WARPGROUPS):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
                rows = pl.ds(now.first_row + w * BLOCK_Q, BLOCK_Q)
                plgpu.copy_gmem_to_smem(q_gmem.at[now.batch, rows, now.head], q_smem.at[w], q_full.at[w])

            def copy(tile, done):
                s = stage(done)
                slots = pl.ds(tile * block_kv, block_kv)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[s]))
                plgpu.copy_gmem_to_smem(k_gmem.at[now.batch, kv_head, slots], k_smem.at[s], full.at[s])
                plgpu.copy_gmem_to_smem(columns_gmem.at[now.batch, kv_head, :, slots], columns_smem.at[s], full.at[s])
                plgpu.copy_gmem_to_smem(v_gmem.at[now.batch, kv_head, :, slots], v_smem.at[s], full.at[s])
                return done + 1

            return lax.fori_loop(begin, end, copy, done)

        lax.fori_loop(0, count, visit, jnp.int32(0))

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        row_of = warpgroup * BLOCK_Q
        result = plgpu.ShapeDtypeStruct((BLOCK_Q,), jnp.float32, layout=_ROW)
        load = plgpu.inline_mgpu(arg_types=(_SCALAR, _SCALAR, plgpu.RefType()), return_type=result)(registers.load_rows)

        def scales(block: _Block):
            return load(block.first_row + row_of, block.head, q_scale_gmem.at[block.batch]) * to_scores

        def visit(i, carry):
            now, row_to_scores, done = carry
            following = block(i + 1)
            begin, full_end, end = tile_range(now)
            plgpu.barrier_wait(q_full.at[warpgroup])
            tiles = _Tiles(
                q=q_smem.at[warpgroup], k=k_smem, v=v_smem, columns=columns_smem, full=full, free=free,
                q_free=q_free.at[warpgroup], turn=turns.at[warpgroup], other_turn=turns.at[1 - warpgroup],
                stage=lambda tile: stage(done + tile - begin), to_scores=row_to_scores,
                first_position=now.position + row_of, length=now.length, causal=causal, window=window, softcap=softcap,
                zero_scores=zero_scores, zero_product=zero_product,
            )  # fmt: skip
            unit, total, out = (_one_by_one if pipeline == 1 else _overlapped)(tiles, begin, full_end, end)
            if sinks_gmem:
                total += jnp.exp2(sinks_gmem[0][now.head] - unit) * formats.PROBABILITY_SCALE
            following_scales = scales(following)
            inverse = jnp.where(total > 0, 1.0 / (jnp.where(total > 0, total, 1.0) * CODE_UNIT), 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = (out * _over_columns(inverse, out.shape)).astype(out_smem.dtype)
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(now.first_row + row_of, BLOCK_Q), BLOCK_Q)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[now.batch, rows, now.head])
            return following, following_scales, done + end - begin

        def zeros(columns: int):
            make = functools.partial(registers.zeros, shape=(BLOCK_Q, columns))
            return plgpu.inline_mgpu(arg_types=(), return_type=_matrix(columns))(make)()

        zero_scores, zero_product = zeros(block_kv), zeros(v_smem.shape[1])
        # The first turn is the first warpgroup's.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turns.at[0]))
        first = block(0)
        lax.fori_loop(0, count, visit, (first, scales(first), jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)


class _Block(NamedTuple):
    """Queries of one head and sequence."""

    batch: jax.Array
    head: jax.Array
    first_row: jax.Array
    start: jax.Array  # position of the sequence's first query
    length: jax.Array  # of the sequence's keys

    @property
    def position(self) -> jax.Array:
        return self.start + self.first_row


class _Peaks(NamedTuple):
    """Greatest exponents of a row."""

    last: jax.Array  # of the last tile: the unit of the sums and the output
    floor: jax.Array  # the least that a tile's may be: ``_PEAK_RANGE`` below that of all tiles


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a compute warpgroup does with a tile; the order is the pipelines' affair."""

    q: Any  # [queries, head_dim]
    k: Any  # [stages, keys, head_dim]
    v: Any  # [stages, head_dim and in pipeline 2 SUM_COLUMNS, keys]
    columns: Any  # [stages, 3, keys]: the numbers of ``prefill.prepare``
    full: Any  # [stages]
    free: Any  # [stages]
    q_free: Any
    turn: Any  # this warpgroup's barrier
    other_turn: Any  # the other's
    stage: Callable[[jax.Array], jax.Array]
    to_scores: jax.Array  # [queries]
    first_position: jax.Array
    length: jax.Array
    causal: bool
    window: int | None
    softcap: float | None  # of scores in the logarithm's unit; ``to_scores`` gives multiples of it
    zero_scores: jax.Array  # [queries, keys]
    zero_product: jax.Array  # [queries, rows of v]

    @property
    def shape(self) -> tuple[int, int]:
        return BLOCK_Q, self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[2]

    # Before a product's zeros are made: between them and the product a branch would make the compiler write them out.
    def wait(self, tile) -> None:
        """Until the tile has arrived."""
        plgpu.barrier_wait(self.full.at[self.stage(tile)])

    def release(self, tile) -> None:
        plgpu.barrier_arrive(self.free.at[self.stage(tile)])

    def release_queries(self) -> None:
        plgpu.barrier_arrive(self.q_free)

    # Turns cannot hang: both warpgroups take one in each tile of the thread block, also where the queries of one see
    # nothing of it or do not exist, and between taking a turn and passing it on a warpgroup waits for its own products
    # alone. The tiles and queries that it waits for in front of a turn depend on what was released after earlier turns.
    def take_turn(self) -> None:
        """Wait until the other warpgroup has its product P V."""
        plgpu.barrier_wait(self.turn)

    def pass_turn(self) -> None:
        plgpu.barrier_arrive(self.other_turn)

    def start_scores(self, tile):
        """Q K^T in flight, in units of the codes; :meth:`finish` waits for it."""
        ref, result = plgpu.RefType(swizzle(self.head_dim)), _matrix(self.shape[1])
        start = plgpu.inline_mgpu(arg_types=(ref, ref, _MATRIX), return_type=result)(registers.start_product)
        return start(self.q, self.k.at[self.stage(tile)], self.zero_scores)

    def start_product(self, p, tile, first=None):
        """P V in flight; with ``first``, the product in flight of as many keys before, added to that."""
        keys = p.shape[1]
        types = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzle(PRODUCT_KEYS)), _MATRIX)
        start = functools.partial(registers.start_product, in_flight=first is not None)
        start = plgpu.inline_mgpu(arg_types=types, return_type=_matrix(self.v.shape[1]))(start)
        v = self.v.at[self.stage(tile), :, pl.ds(0 if first is None else keys, keys)]
        return start(p, v, self.zero_product if first is None else first)

    def finish(self, product, *, later: int = 0):
        """A product in flight, once at most ``later`` that were started after it still run."""
        finish = functools.partial(registers.finish_product, later=later)
        return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=_matrix(product.shape[1]))(finish)(product)

    def exponents(self, scores, tile, peaks: _Peaks, key_scale, *, masked: bool):
        """log2 of P, the new peaks and the decay of what was summed before.

        P = exp2(score + log2 v_scale - peak) * PROBABILITY_SCALE, so that the largest term of a
        tile is exact in E4M3 whatever other tiles hold.
        """
        scores *= _over_rows(key_scale, self.shape)
        scores = scores * _over_columns(self.to_scores, self.shape)
        if self.softcap is not None:
            scores = jnp.tanh(scores) * self.softcap
        scores += _over_rows(self.load_column(tile, registers.LOG_VALUE_SCALE), self.shape)
        if masked:
            scores = jnp.where(self._visible(tile), scores, -jnp.inf)
        tile_peak = jnp.max(scores, axis=1)
        last = jnp.maximum(tile_peak, peaks.floor)
        # Until a row sees its first key its peak is -inf, and -inf - -inf would be NaN.
        peak = jnp.where(last == -jnp.inf, 0.0, last) if masked else last
        decay = jnp.exp2(peaks.last - peak)
        exponents = scores - _over_columns(peak - math.log2(formats.PROBABILITY_SCALE), self.shape)
        return exponents, _Peaks(last, jnp.maximum(peaks.floor, tile_peak - _PEAK_RANGE)), decay

    def load_column(self, tile, which: int):
        """One of the numbers for each key of a tile that has arrived."""
        ref = self.columns.at[self.stage(tile), which]
        result = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=_COLUMN)
        load = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(registers.load_columns)
        return load(ref)

    def _visible(self, tile):
        slot = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=_MATRIX) + tile * self.shape[1]
        position = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=_MATRIX) + self.first_position
        # One comparison an element: the lesser bound is a row's.
        visible = slot < (jnp.minimum(position + 1, self.length) if self.causal else self.length)
        if self.window is not None:
            visible &= slot > position - self.window
        return visible


def _one_by_one(tiles: _Tiles, begin, full_end, end):
    """Pipeline 1: the products of a tile wait for its softmax. Returns sums' units as peaks, row sums and output."""

    def step(tile, carry, *, masked: bool):
        peaks, total, out = carry
        tiles.wait(tile)
        scores = tiles.finish(tiles.start_scores(tile))
        key_scale = tiles.load_column(tile, registers.KEY_SCALE)
        exponents, peaks, decay = tiles.exponents(scores, tile, peaks, key_scale, masked=masked)
        p = jnp.exp2(exponents)
        inverse_scale = tiles.load_column(tile, registers.INVERSE_VALUE_SCALE)
        total = total * decay + jnp.sum(p * _over_rows(inverse_scale, tiles.shape), axis=1)
        product = tiles.finish(tiles.start_product(_operand(p), tile))
        out = out * _over_columns(decay, out.shape) + product
        tiles.release(tile)
        return peaks, total, out

    carry = _lowest(), plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), _ROW), _zeros(tiles.head_dim)
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full_end, end, functools.partial(step, masked=True), carry)
    tiles.release_queries()
    peaks, total, out = carry
    return peaks.last, total, out


def _overlapped(tiles: _Tiles, begin, full_end, end):
    """Pipeline 2: P V begins under the softmax, and Q K^T of the next tile follows it at once; returns likewise."""

    def first(tile, carry):
        del carry
        tiles.wait(tile)
        return tiles.finish(tiles.start_scores(tile)), tiles.load_column(tile, registers.KEY_SCALE)

    def step(tile, carry, *, masked: bool, last: bool):
        scores, key_scale, peaks, sums, out = carry
        exponents, peaks, decay = tiles.exponents(scores, tile, peaks, key_scale, masked=masked)
        left, right = _split(exponents, PRODUCT_KEYS)
        p = _operand(jnp.exp2(left))
        if not last:
            tiles.wait(tile + 1)
        tiles.take_turn()
        product = tiles.start_product(p, tile)
        product = tiles.start_product(_operand(jnp.exp2(right)), tile, product)
        if not last:
            # Into the registers of this tile's scores, which are P by now.
            scores = tiles.start_scores(tile + 1)
        product = tiles.finish(product, later=0 if last else 1)
        tiles.pass_turn()
        product, tile_sums = _split(product, tiles.head_dim)
        sums = sums * _over_columns(decay, sums.shape) + tile_sums * tiles.columns[tiles.stage(tile), registers.UNIT, 0]
        out = out * _over_columns(decay, out.shape) + product
        tiles.release(tile)
        if not last:
            # Loaded under Q.K^T; the rest of the tile's numbers would not fit beside its scores.
            key_scale = tiles.load_column(tile + 1, registers.KEY_SCALE)
            scores = tiles.finish(scores)
        return scores, key_scale, peaks, sums, out

    no_scale = plgpu.layout_cast(jnp.zeros(tiles.shape[1:], jnp.float32), _COLUMN)
    ahead = lax.fori_loop(begin, jnp.minimum(begin + 1, end), first, (_zeros(tiles.shape[1]), no_scale))
    before_last = jnp.maximum(end - 1, begin)
    full_end = jnp.minimum(full_end, before_last)
    carry = *ahead, _lowest(), _zeros(registers.SUM_COLUMNS), _zeros(tiles.head_dim)
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False, last=False), carry)
    carry = lax.fori_loop(full_end, before_last, functools.partial(step, masked=True, last=False), carry)
    tiles.release_queries()
    *_, peaks, sums, out = lax.fori_loop(before_last, end, functools.partial(step, masked=True, last=True), carry)
    column = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=_MATRIX).astype(jnp.float32)
    return peaks.last, jnp.sum(sums * jnp.exp2(-math.log2(registers.SUM_STEP) * column), axis=1), out


def _matrix(columns: int):
    """The type of a float32 matrix with a row a query."""
    return plgpu.ShapeDtypeStruct((BLOCK_Q, columns), jnp.float32, layout=_MATRIX)


def _lowest():
    """Peaks before the first tile."""
    lowest = plgpu.layout_cast(jnp.full((BLOCK_Q,), -jnp.inf, jnp.float32), _ROW)
    return _Peaks(lowest, lowest)


def _zeros(columns: int):
    """A matrix before the first tile."""
    return plgpu.layout_cast(jnp.zeros((BLOCK_Q, columns), jnp.float32), _MATRIX)


def _operand(p):
    """P in E4M3, as an A operand."""
    result = plgpu.ShapeDtypeStruct(p.shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
    return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(registers.probabilities_to_operand)(p)


def _split(x, column: int):
    """A matrix in front of ``column`` and from there on."""
    result = _matrix(column), _matrix(x.shape[1] - column)
    split = functools.partial(registers.split_columns, column=column)
    return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(split)(x)


def _over_rows(x, shape: tuple[int, ...]):
    """One number for each column -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (1,))


def _over_columns(x, shape: tuple[int, ...]):
    """One number for each row -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))
