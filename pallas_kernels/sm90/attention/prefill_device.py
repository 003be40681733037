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

from pallas_kernels import formats, jax_compat
from pallas_kernels.sm90.attention import prefill_registers as registers
from pallas_kernels.sm90.attention.registers import CODE_UNIT

BLOCK_Q = 64  # queries of a warpgroup: WGMMA's M
_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each query
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each key
_SCALAR = plgpu.Layout.WG_SPLAT(())
# Of the lazy softmax: log2 of a row's largest P where the maximum is followed, and how far it may grow until it is
# again: to just under E4M3's largest number, 448.
_EXPONENT, _LIMIT = 7.0, 8.8
# Registers a thread: the copying warpgroup gives what it does not need to the computing ones.
_REGISTERS = {1: (24, 240), 2: (24, 240), 3: (24, 160)}


def prepare_kernel(
    k_gmem, k_scale_gmem, v_gmem, v_scale_gmem, kv_lengths_gmem, keys_gmem, values_gmem, columns_gmem,
) -> None:  # fmt: skip
    """One block: ``PREPARED_TOKENS`` tokens of one kv head as :func:`kernel`'s operands."""
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    first = lax.axis_index("block") * registers.PREPARED_TOKENS
    ref = plgpu.RefType()

    def own(*refs):
        return (x.at[batch, kv_head] for x in refs)

    sums = values_gmem.shape[2] > keys_gmem.shape[3]
    columns = plgpu.inline_mgpu(arg_types=(_SCALAR, _SCALAR, ref, ref, ref, ref))(
        functools.partial(registers.prepare_columns, sums=sums)
    )
    columns(first, kv_lengths_gmem[batch], *own(k_scale_gmem, v_scale_gmem, columns_gmem, values_gmem))
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
    out_gmem,
    *,
    q_smem,
    out_smem,
    k_smem,
    v_smem,
    columns_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    k_free,
    v_free,
    turns,
    to_scores: float,
    causal: bool,
    window: int | None,
    pipeline: int,
    one_barrier: bool,
    lazy: bool,
) -> None:
    """One thread block: its share of the blocks of ``warpgroups`` x 64 queries of one head."""
    if one_barrier:
        v_full, v_free = k_full, k_free
    warpgroups = q_smem.shape[0]
    stages, block_kv, _ = k_smem.shape
    block_rows = BLOCK_Q * warpgroups
    batches, length, heads, _ = out_gmem.shape
    row_blocks = -(-length // block_rows)
    group = heads // k_gmem.shape[1]
    cta, ctas, warpgroup = lax.axis_index("cta"), lax.axis_size("cta"), lax.axis_index("warpgroup")
    count = lax.div(row_blocks * batches * heads - cta + ctas - 1, jnp.int32(ctas))

    def block(i) -> _Block:
        """This thread block's i-th. Heads that share keys are neighbours, and the longest come first."""
        index = cta + jnp.minimum(i, count - 1) * ctas
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

    @pl.when(warpgroup == warpgroups)
    def _copy():
        plgpu.set_max_registers(_REGISTERS[warpgroups][0], action="decrease")

        def visit(i, done):
            now = block(i)
            kv_head = lax.div(now.head, jnp.int32(group))
            begin, _, end = tile_range(now)
            for w in range(warpgroups):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
                rows = pl.ds(now.first_row + w * BLOCK_Q, BLOCK_Q)
                plgpu.copy_gmem_to_smem(q_gmem.at[now.batch, rows, now.head], q_smem.at[w], q_full.at[w])

            def copy(tile, done):
                s = stage(done)
                slots = pl.ds(tile * block_kv, block_kv)
                refill = done >= stages
                pl.when(refill)(lambda: plgpu.barrier_wait(k_free.at[s]))
                plgpu.copy_gmem_to_smem(k_gmem.at[now.batch, kv_head, slots], k_smem.at[s], k_full.at[s])
                if not one_barrier:
                    # The keys' scales come and go with the values: they outlive the keys.
                    pl.when(refill)(lambda: plgpu.barrier_wait(v_free.at[s]))
                plgpu.copy_gmem_to_smem(columns_gmem.at[now.batch, kv_head, :, slots], columns_smem.at[s], v_full.at[s])
                plgpu.copy_gmem_to_smem(v_gmem.at[now.batch, kv_head, :, slots], v_smem.at[s], v_full.at[s])
                return done + 1

            return lax.fori_loop(begin, end, copy, done)

        lax.fori_loop(0, count, visit, jnp.int32(0))

    @pl.when(warpgroup < warpgroups)
    def _compute():
        plgpu.set_max_registers(_REGISTERS[warpgroups][1], action="increase")
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
                q_smem.at[warpgroup], k_smem, v_smem, columns_smem, k_full, k_free, v_full, v_free,
                lambda tile: stage(done + tile - begin), row_to_scores, now.position + row_of, now.length,
                causal, window, lambda: plgpu.barrier_arrive(q_free.at[warpgroup]), zeros, one_barrier, zero_scores,
                lazy, turns, warpgroup,
            )  # fmt: skip
            pipelines = {
                1: _one_by_one,
                2: _scores_ahead,
                3: functools.partial(_products_together, halves=False),
                4: functools.partial(_products_together, halves=True),
            }
            total, out = pipelines[pipeline](tiles, begin, full_end, end)
            following_scales = scales(following)
            total = tiles.row_sums(total)
            inverse = jnp.where(total > 0, 1.0 / (jnp.where(total > 0, total, 1.0) * CODE_UNIT), 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = (out * _over_columns(inverse, out.shape)).astype(out_smem.dtype)
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(now.first_row + row_of, BLOCK_Q), BLOCK_Q)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[now.batch, rows, now.head])
            return following, following_scales, done + end - begin

        def make_zeros(columns: int):
            shape = (BLOCK_Q, columns)
            result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=_MATRIX)
            make = functools.partial(registers.zeros, shape=shape)
            return plgpu.inline_mgpu(arg_types=(), return_type=result)(make)()

        zeros, zero_scores = make_zeros(v_smem.shape[1]), make_zeros(block_kv)
        if turns is not None:
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


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a compute warpgroup does with a tile; the order is the pipelines' affair."""

    q: Any
    k: Any
    v: Any
    columns: Any  # [stages, 3, block_kv]: the key's scale, the logarithm of the value's, one over it
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    stage: Callable[[jax.Array], jax.Array]
    to_scores: jax.Array
    first_position: jax.Array
    length: jax.Array
    causal: bool
    window: int | None
    release_queries: Callable[[], None]
    zeros: jax.Array  # [queries, head_dim]
    one_barrier: bool  # for all of a tile
    zero_scores: jax.Array  # [queries, keys]
    lazy: bool
    turns: Any  # a barrier for each of two warpgroups, or None
    warpgroup: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return BLOCK_Q, self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[2]

    @property
    def sums(self) -> bool:
        """Whether P.V has columns with the softmax's sums."""
        return self.v.shape[1] > self.head_dim

    def add(self, total, out, product, decay, tile):
        """Row sums and output with this tile's product added; reads the tile's numbers."""
        if self.sums:
            parts = (self.head_dim, registers.SUM_COLUMNS)
            result = tuple(plgpu.ShapeDtypeStruct((BLOCK_Q, n), jnp.float32, layout=_MATRIX) for n in parts)
            split = plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(registers.split_product)
            product, sums = split(product)
            unit = self.columns[self.stage(tile), 2, 0]
            total = total * _over_columns(decay, total.shape) + sums * unit
        return total, out * _over_columns(decay, out.shape) + product

    def row_sums(self, total):
        """The softmax's sums of the rows."""
        if not self.sums:
            return total
        columns = plgpu.broadcasted_iota(jnp.int32, total.shape, 1, layout=_MATRIX).astype(jnp.float32)
        return jnp.sum(total * jnp.exp2(-math.log2(registers.SUM_STEP) * columns), axis=1)

    # Both before the accumulators are made: between their zeros and the products a branch would make
    # the compiler write them out.
    def wait_for_keys(self, tile) -> None:
        plgpu.barrier_wait(self.k_full.at[self.stage(tile)])

    def wait_for_values(self, tile) -> None:
        """The tile's values and columns' numbers."""
        if not self.one_barrier:
            plgpu.barrier_wait(self.v_full.at[self.stage(tile)])

    def release_keys(self, tile) -> None:
        if not self.one_barrier:
            plgpu.barrier_arrive(self.k_free.at[self.stage(tile)])

    def release_values(self, tile) -> None:
        free = self.k_free if self.one_barrier else self.v_free
        plgpu.barrier_arrive(free.at[self.stage(tile)])

    def start_scores(self, acc, tile) -> None:
        """Begin acc += Q K^T, in units of the codes."""
        plgpu.wgmma(acc, self.q, jax_compat.transpose_ref(self.k.at[self.stage(tile)]))

    def finish_scores(self, acc, tile):
        """The scores, once no product runs any more; frees the tile's keys."""
        scores = acc[...]
        self.release_keys(tile)
        return scores

    def load_key_scale(self, tile):
        """The keys' scales of a tile that has arrived."""
        return self._load_column(self.stage(tile), 0)

    def softmax(self, scores, tile, peak, total, *, masked: bool):
        """P, the new row maxima and sums, and the decay of what was summed before; sums are of P / v_scale."""
        key_scale = self.load_key_scale(tile)
        exponent, peak, decay = self.exponents(scores, tile, peak, masked=masked, key_scale=key_scale)
        p = jnp.exp2(exponent)
        if not self.sums:
            total = total * decay + jnp.sum(p * self._column(self.stage(tile), 2), axis=1)
        return p, peak, total, decay

    def exponents(self, scores, tile, peak, *, masked: bool, key_scale):
        """log2 of P, the new row maxima and the decay of what was summed before.

        P = exp2(score + log2 v_scale - maximum) * PROBABILITY_SCALE, so that the largest term of
        every output is exact in E4M3.
        """
        scores *= _over_rows(key_scale, self.shape)
        scores = scores * _over_columns(self.to_scores, self.shape) + self._column(self.stage(tile), 1)
        if masked:
            scores = jnp.where(self._visible(tile), scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        # Until a row sees its first key its maximum is -inf, and -inf - -inf would be NaN.
        safe_peak = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        decay = jnp.exp2(peak - safe_peak)
        return scores - _over_columns(safe_peak - math.log2(formats.PROBABILITY_SCALE), self.shape), new_peak, decay

    def lazy_exponents(self, scores, tile, state, *, masked: bool, key_scale):
        """As :meth:`exponents`, where maxima follow only in large steps.

        ``state`` is of each row: what is added to scores in units of the codes, minus the reference, and
        how large an exponent may become, -inf before the row's first key. The exponents come out of the two
        FMAs that scale the scores; only a warp with a row beyond its limit subtracts again.
        """
        offset, limit = state
        exponent = scores * _over_rows(key_scale, self.shape) + _over_columns(offset, self.shape)
        exponent = exponent * _over_columns(self.to_scores, self.shape) + self._column(self.stage(tile), 1)
        if masked:
            exponent = jnp.where(self._visible(tile), exponent, -jnp.inf)
        peak = jnp.max(exponent, axis=1)

        def follow(exponent, offset, limit):
            beyond = peak > limit
            excess = jnp.where(beyond, peak - _EXPONENT, 0.0)
            decay = jnp.minimum(jnp.exp2(-excess), 1.0)
            offset -= excess / self.to_scores
            return exponent - _over_columns(excess, self.shape), offset, jnp.where(beyond, _LIMIT, limit), decay

        def keep(exponent, offset, limit):
            return exponent, offset, limit, plgpu.layout_cast(jnp.ones((BLOCK_Q,), jnp.float32), _ROW)

        vote = plgpu.inline_mgpu(
            arg_types=(_ROW, _ROW), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)
        )(registers.any_above)
        exponent, offset, limit, decay = lax.cond(vote(peak, limit) != 0, follow, keep, exponent, offset, limit)
        return exponent, (offset, limit), decay

    def operand(self, p):
        """P in E4M3, as an A operand."""
        result = plgpu.ShapeDtypeStruct(p.shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
        return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(registers.probabilities_to_operand)(p)

    def _column(self, stage, which: int):
        """One of the numbers for each key, over the rows of a tile."""
        return _over_rows(self._load_column(stage, which), self.shape)

    def _load_column(self, stage, which: int):
        ref = self.columns.at[stage, which]
        result = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=_COLUMN)
        load = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(registers.load_columns)
        return load(ref)

    def start_scores_apart(self, tile):
        """Q K^T in flight, apart from a scope: :meth:`finish` waits for it."""
        types = (_wgmma_ref(self.q), _wgmma_ref(self.k), _MATRIX)
        result = plgpu.ShapeDtypeStruct(self.shape, jnp.float32, layout=_MATRIX)
        start = plgpu.inline_mgpu(arg_types=types, return_type=result)(registers.start_product)
        return start(self.q, self.k.at[self.stage(tile)], self.zero_scores)

    def start_product(self, p, tile, first=None):
        """P V in flight; with ``first``, the product of as many keys before, added to that."""
        keys = p.shape[1]
        types = (plgpu.Layout.WGMMA_8BIT, _wgmma_ref(self.v, keys), _MATRIX)
        result = plgpu.ShapeDtypeStruct(self.zeros.shape, jnp.float32, layout=_MATRIX)
        start = functools.partial(registers.start_product, in_flight=first is not None)
        start = plgpu.inline_mgpu(arg_types=types, return_type=result)(start)
        v = self.v.at[self.stage(tile), :, pl.ds(0 if first is None else keys, keys)]
        return start(p, v, self.zeros if first is None else first)

    def halves(self, x):
        """The columns of the first and of the second half."""
        half = plgpu.ShapeDtypeStruct((BLOCK_Q, x.shape[1] // 2), jnp.float32, layout=_MATRIX)
        return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=(half, half))(registers.halves)(x)

    def take_turn(self) -> None:
        """Wait until the other warpgroup has started its products."""
        if self.turns is not None:
            plgpu.barrier_wait(self.turns.at[self.warpgroup])

    def pass_turn(self) -> None:
        if self.turns is not None:
            plgpu.barrier_arrive(self.turns.at[1 - self.warpgroup])

    def finish(self, product, *, later: int):
        """A product in flight, once at most ``later`` that were started after it still run."""
        result = plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=_MATRIX)
        finish = functools.partial(registers.finish_product, later=later)
        return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(finish)(product)

    def product(self, p, tile):
        """P V, accumulated from zero."""

        def run(acc) -> None:
            plgpu.wgmma(acc, p, jax_compat.transpose_ref(self.v.at[self.stage(tile)]))

        return pl.run_state(run)(plgpu.WGMMAAccumulatorRef.init(self.zeros))

    def _visible(self, tile):
        slot = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=_MATRIX) + tile * self.shape[1]
        position = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=_MATRIX) + self.first_position
        # One comparison an element: the lesser bound is a row's.
        visible = slot < (jnp.minimum(position + 1, self.length) if self.causal else self.length)
        if self.window is not None:
            visible &= slot > position - self.window
        return visible


def _wgmma_ref(ref, width: int | None = None):
    """The type of one tile of ``ref``, as inline code takes it."""
    width = width or min(128, ref.shape[-1])
    return plgpu.RefType((plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)))


def _initial(tiles: _Tiles):
    """Row maxima, row sums and output before the first tile."""
    peak = plgpu.layout_cast(jnp.full((BLOCK_Q,), -jnp.inf, jnp.float32), _ROW)
    if tiles.sums:
        total = plgpu.layout_cast(jnp.zeros((BLOCK_Q, registers.SUM_COLUMNS), jnp.float32), _MATRIX)
    else:
        total = plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), _ROW)
    out = plgpu.layout_cast(jnp.zeros((BLOCK_Q, tiles.head_dim), jnp.float32), _MATRIX)
    if tiles.lazy:
        peak = _EXPONENT / tiles.to_scores, peak
    return peak, total, out


def _one_by_one(tiles: _Tiles, begin, full_end, end):
    """Pipeline 1: the products of a tile wait for its softmax. Returns row sums and output."""

    def step(tile, carry, *, masked: bool):
        peak, total, out = carry

        def scores_of(acc):
            tiles.start_scores(acc, tile)
            return tiles.finish_scores(acc, tile)

        tiles.wait_for_keys(tile)
        tiles.wait_for_values(tile)
        scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef(tiles.shape))
        p, peak, total, decay = tiles.softmax(scores, tile, peak, total, masked=masked)
        product = tiles.product(tiles.operand(p), tile)
        total, out = tiles.add(total, out, product, decay, tile)
        tiles.release_values(tile)
        return peak, total, out

    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False), _initial(tiles))
    carry = lax.fori_loop(full_end, end, functools.partial(step, masked=True), carry)
    tiles.release_queries()
    return carry[1:]


def _scores_ahead(tiles: _Tiles, begin, full_end, end):
    """Pipeline 2: the scores of the next tile are computed under this tile's softmax; returns likewise."""

    def first(tile, scores):
        del scores

        def scores_of(acc):
            tiles.start_scores(acc, tile)
            return tiles.finish_scores(acc, tile)

        tiles.wait_for_keys(tile)
        return pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef(tiles.shape))

    def step(tile, carry, *, masked: bool, last: bool):
        scores, peak, total, out = carry

        def ahead(next_acc):
            if not last:
                tiles.start_scores(next_acc, tile + 1)
            p, new_peak, new_total, decay = tiles.softmax(scores, tile, peak, total, masked=masked)
            product = tiles.product(tiles.operand(p), tile)
            next_scores = scores if last else tiles.finish_scores(next_acc, tile + 1)
            new_total, new_out = tiles.add(new_total, out, product, decay, tile)
            tiles.release_values(tile)
            return next_scores, new_peak, new_total, new_out

        tiles.wait_for_values(tile)
        if not last:
            tiles.wait_for_keys(tile + 1)
        return pl.run_scoped(ahead, plgpu.WGMMAAccumulatorRef(tiles.shape))

    zeros = plgpu.layout_cast(jnp.zeros(tiles.shape, jnp.float32), _MATRIX)
    scores = lax.fori_loop(begin, jnp.minimum(begin + 1, end), first, zeros)
    before_last = jnp.maximum(end - 1, begin)
    full_end = jnp.minimum(full_end, before_last)
    carry = (scores, *_initial(tiles))
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False, last=False), carry)
    carry = lax.fori_loop(full_end, before_last, functools.partial(step, masked=True, last=False), carry)
    tiles.release_queries()
    carry = lax.fori_loop(before_last, end, functools.partial(step, masked=True, last=True), carry)
    return carry[2:]


def _products_together(tiles: _Tiles, begin, full_end, end, *, halves: bool):
    """Pipelines 3 and 4 (``halves``); returns likewise."""

    def first(tile, carry):
        tiles.wait_for_keys(tile)
        scores = tiles.start_scores_apart(tile)
        return tiles.finish(scores, later=0), tiles.load_key_scale(tile)

    def step(tile, carry, *, masked: bool, last: bool):
        scores, key_scale, peak, total, out = carry
        exponents = tiles.lazy_exponents if tiles.lazy else tiles.exponents
        exponent, peak, decay = exponents(scores, tile, peak, masked=masked, key_scale=key_scale)
        first, *second = tiles.halves(exponent) if halves else (exponent,)
        p = tiles.operand(jnp.exp2(first))
        if not last:
            tiles.wait_for_keys(tile + 1)
        tiles.take_turn()
        product = tiles.start_product(p, tile)
        for half in second:
            product = tiles.start_product(tiles.operand(jnp.exp2(half)), tile, product)
        if not last:
            scores = tiles.start_scores_apart(tile + 1)
        tiles.pass_turn()
        product = tiles.finish(product, later=0 if last else 1)
        total, out = tiles.add(total, out, product, decay, tile)
        tiles.release_values(tile)
        if not last:
            # Loaded under Q.K^T; the rest of the tile's numbers would not fit beside its scores.
            key_scale = tiles.load_key_scale(tile + 1)
            scores = tiles.finish(scores, later=0)
        return scores, key_scale, peak, total, out

    zeros = plgpu.layout_cast(jnp.zeros(tiles.zero_scores.shape, jnp.float32), _MATRIX)
    column = plgpu.layout_cast(jnp.zeros(tiles.shape[1:], jnp.float32), _COLUMN)
    scores = lax.fori_loop(begin, jnp.minimum(begin + 1, end), first, (zeros, column))
    before_last = jnp.maximum(end - 1, begin)
    full_end = jnp.minimum(full_end, before_last)
    carry = (*scores, *_initial(tiles))
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False, last=False), carry)
    carry = lax.fori_loop(full_end, before_last, functools.partial(step, masked=True, last=False), carry)
    tiles.release_queries()
    carry = lax.fori_loop(before_last, end, functools.partial(step, masked=True, last=True), carry)
    return carry[3:]


def _over_rows(x, shape: tuple[int, ...]):
    """One number for each column -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (1,))


def _over_columns(x, shape: tuple[int, ...]):
    """One number for each row -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))
