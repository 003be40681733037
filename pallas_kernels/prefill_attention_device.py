"""Device code of the prefill kernels; ``prefill_attention_sm90`` describes and launches them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat
from pallas_kernels import prefill_attention_registers_sm90 as registers
from pallas_kernels.prefill_attention_registers_sm90 import TOTAL_ROWS

BLOCK_Q = 64  # queries of a warpgroup: WGMMA's M
PREPARED_TOKENS = 128  # tokens of a block of the preparation
_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each query
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each key
_SCALAR = plgpu.Layout.WG_SPLAT(())
# Registers a thread: the copying warpgroup gives what it does not need to the computing ones.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240
# A row's maximum before its first key: finite, so that no difference of maxima is NaN.
_LOWEST = -1e30


def prepare_kernel(
    k_gmem, k_scale_gmem, v_gmem, v_scale_gmem, highest_gmem, kv_lengths_gmem, keys_gmem, values_gmem, columns_gmem,
    *, units_smem,
) -> None:  # fmt: skip
    """One block: 128 tokens of one kv head as the prefill kernel's operands."""
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    first = lax.axis_index("block") * PREPARED_TOKENS
    scalars = (first, kv_lengths_gmem[batch], highest_gmem[batch, kv_head])
    refs = (k_scale_gmem, v_scale_gmem, columns_gmem, values_gmem)
    _inline(registers.prepare_columns, (_SCALAR,) * 3 + (plgpu.RefType(),) * 5)(
        *scalars, *(ref.at[batch, kv_head] for ref in refs), units_smem
    )
    _inline(registers.prepare_keys, (_SCALAR, plgpu.RefType(), plgpu.RefType()))(
        first, k_gmem.at[batch, kv_head], keys_gmem.at[batch, kv_head]
    )
    plgpu.commit_smem()
    _inline(registers.prepare_values, (_SCALAR, *(plgpu.RefType(),) * 3))(
        first, v_gmem.at[batch, kv_head], units_smem, values_gmem.at[batch, kv_head]
    )


def parts(head_dim: int) -> list[tuple[int, int]]:
    """(first, rows) of the pieces of V^T and its totals: at most 256 rows, WGMMA's N and TMA's box."""
    return [(0, 128), (128, 128 + TOTAL_ROWS)] if head_dim == 256 else [(0, head_dim + TOTAL_ROWS)]


def kernel(
    q_gmem,
    q_scale_gmem,
    k_gmem,
    v_gmem,
    columns_gmem,
    highest_gmem,
    query_start_gmem,
    kv_lengths_gmem,
    out_gmem,
    *,
    q_smem,
    out_smem,
    k_smem,
    v_smem,
    columns_smem,
    sum_smem,
    q_barriers,
    k_full,
    v_full,
    k_free,
    v_free,
    to_scores: float,
    causal: bool,
    window: int | None,
    settle_every: int,
    take_turns: bool,
) -> None:
    """One block: ``warpgroups`` x 64 queries of one head against the tiles they can see."""
    warpgroups = q_smem.shape[0]
    stages, block_kv, head_dim = k_smem.shape
    block_rows = BLOCK_Q * warpgroups
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    kv_head = lax.div(head, jnp.int32(out_gmem.shape[2] // k_gmem.shape[1]))
    # The last queries see the most keys: starting with them leaves short blocks for the end.
    first_row = (-(-out_gmem.shape[1] // block_rows) - 1 - lax.axis_index("block")) * block_rows

    start, length = query_start_gmem[batch], kv_lengths_gmem[batch]
    first_position = start + first_row
    end_slot = jnp.minimum(length, first_position + block_rows) if causal else length
    end = pl.cdiv(end_slot, jnp.int32(block_kv))
    begin = jnp.int32(0)
    if window is not None:
        begin = lax.div(jnp.maximum(first_position - (window - 1), 0), jnp.int32(block_kv))
    begin = jnp.minimum(begin, end)
    # Every query of the block sees all of the tiles before this one.
    full_slots = jnp.minimum(length, first_position + 1) if causal else length
    full_end = jnp.clip(lax.div(full_slots, jnp.int32(block_kv)), begin, end) if window is None else begin

    def stage(tile):
        return lax.rem(tile - begin, jnp.int32(stages))

    @pl.when(warpgroup == warpgroups)
    def _copy():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        @pl.loop(begin, end)
        def _tile(tile):
            s = stage(tile)
            slots = pl.ds(tile * block_kv, block_kv)
            refill = tile - begin >= stages
            pl.when(refill)(lambda: plgpu.barrier_wait(k_free.at[s]))
            plgpu.copy_gmem_to_smem(k_gmem.at[batch, kv_head, slots], k_smem.at[s], k_full.at[s])
            # The keys' scales come and go with the values: they outlive the keys.
            pl.when(refill)(lambda: plgpu.barrier_wait(v_free.at[s]))
            plgpu.copy_gmem_to_smem(columns_gmem.at[batch, kv_head, :, slots], columns_smem.at[s], v_full.at[s])
            for first, rows in parts(head_dim):
                channels = pl.ds(first, rows)
                plgpu.copy_gmem_to_smem(v_gmem.at[batch, kv_head, tile, channels], v_smem.at[s, channels], v_full.at[s])

    @pl.when(warpgroup < warpgroups)
    def _compute():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        row = first_row + warpgroup * BLOCK_Q
        rows = pl.ds(row, BLOCK_Q)
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, rows, head], q_smem.at[warpgroup], q_barriers.at[warpgroup])
        result = plgpu.ShapeDtypeStruct((BLOCK_Q,), jnp.float32, layout=_ROW)
        q_scale = _inline(registers.load_rows, (_SCALAR, _SCALAR, plgpu.RefType()), result)(
            row, head, q_scale_gmem.at[batch]
        )
        _inline(registers.clear_sum, (plgpu.RefType(),))(sum_smem.at[warpgroup])
        plgpu.barrier_wait(q_barriers.at[warpgroup])
        tiles = _Tiles(
            q_smem.at[warpgroup], k_smem, v_smem, columns_smem, sum_smem.at[warpgroup], k_full, k_free, v_full,
            v_free, stage, q_scale * to_scores, first_position + warpgroup * BLOCK_Q, length, causal, window,
            take_turns, warpgroup,
        )  # fmt: skip
        highest = highest_gmem[batch, kv_head]
        out = _attend(tiles, begin, full_end, end, settle_every, highest)
        out_smem[warpgroup] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a compute warpgroup does with a tile; the order is :func:`_attend`'s affair."""

    q: Any
    k: Any
    v: Any
    columns: Any  # [stages, 2, block_kv]: the key's scale, log2 of the mantissa of the value's
    sum: Any
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
    take_turns: bool
    warpgroup: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return BLOCK_Q, self.k.shape[1]

    @property
    def parts(self) -> list[tuple[int, int]]:
        return parts(self.k.shape[2])

    @property
    def sums(self) -> list[Any]:
        """This warpgroup's shared memory for each part of the output."""
        return [self.sum.at[pl.ds(BLOCK_Q * first, BLOCK_Q * rows)] for first, rows in self.parts]

    def wait_for_keys(self, tile) -> None:
        plgpu.barrier_wait(self.k_full.at[self.stage(tile)])

    def start_scores(self, acc, tile) -> None:
        """Begin acc += Q K^T, in units of the codes."""
        plgpu.wgmma(acc, self.q, jax_compat.transpose_ref(self.k.at[self.stage(tile)]))

    def finish_scores(self, acc, tile, *, products_left: int):
        """The scores, once no more than ``products_left`` later products run; frees the tile's keys."""
        scores = plgpu.wgmma_accumulator_load(acc, wait_n=products_left)
        plgpu.barrier_arrive(self.k_free.at[self.stage(tile)])
        return scores

    def softmax(self, scores, tile, peak, *, masked: bool):
        """P, the new row maxima and the decay of what was summed before.

        P = exp2(score + log2 m - maximum) * PROBABILITY_SCALE, m the mantissa of the value's scale:
        the largest P of a row is exact in E4M3. Waits for the tile's values.
        """
        s = self.stage(tile)
        plgpu.barrier_wait(self.v_full.at[s])
        scores *= self._column(s, 0)
        scores = scores * _over_columns(self.to_scores, self.shape) + self._column(s, 1)
        if masked:
            scores = jnp.where(self._visible(tile), scores, -jnp.inf)
        row = plgpu.ShapeDtypeStruct((BLOCK_Q,), jnp.float32, layout=_ROW)
        new_peak = _inline(registers.row_maxima, (_ROW, _MATRIX), row)(peak, scores)
        p = jnp.exp2(scores - _over_columns(new_peak - math.log2(formats.PROBABILITY_SCALE), self.shape))
        return p, new_peak, jnp.exp2(peak - new_peak)

    def operand(self, p):
        """P as E4M3 A operand."""
        result = plgpu.ShapeDtypeStruct(self.shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
        return _inline(registers.probabilities_to_operand, (_MATRIX,), result)(p)

    def _column(self, stage, which: int):
        """One of the numbers for each key, over the rows of a tile."""
        ref = self.columns.at[stage, which]
        result = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=_COLUMN)
        return lax.broadcast_in_dim(_inline(registers.load_columns, (plgpu.RefType(),), result)(ref), self.shape, (1,))

    def start_products(self, out, p, tile):
        """Begin out + P V for each part of V; the result holds nothing before :meth:`finish_products`."""
        size = self.v.shape[2]  # of a row, in bytes
        swizzle = min(128, size)
        transforms = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
        types = (_MATRIX, plgpu.Layout.WGMMA_8BIT, plgpu.RefType(transforms))
        start = functools.partial(registers.start_product, swizzle=swizzle)
        values = [self.v.at[self.stage(tile), pl.ds(first, rows)] for first, rows in self.parts]
        return tuple(_inline(start, types, _like(part))(part, p, v) for part, v in zip(out, values, strict=True))

    def finish_products(self, out, tile):
        """The parts of the output, when all is done; frees the tile's values."""
        out = tuple(_inline(registers.finish_product, (_MATRIX,), _like(part))(part) for part in out)
        plgpu.barrier_arrive(self.v_free.at[self.stage(tile)])
        return out

    def rescale(self, out, decay):
        """Every part times its rows' decay."""
        return tuple(_inline(registers.rescale, (_MATRIX, _ROW), _like(part))(part, decay) for part in out)

    def settle(self, out, weight, now):
        """Add the parts to the sum in shared memory and clear them, if ``now``."""
        types = (_MATRIX, _ROW, _SCALAR, plgpu.RefType())
        run = [_inline(registers.settle, types, _like(part)) for part in out]
        return tuple(f(part, weight, now, total) for f, part, total in zip(run, out, self.sums, strict=True))

    def normalized(self, out, weight, highest):
        """The output: the sum and the parts over their total weight."""
        head_dim = self.k.shape[2]
        result = plgpu.ShapeDtypeStruct((BLOCK_Q, head_dim), jnp.float32, layout=_MATRIX)
        types = ((_MATRIX,) * len(out), _ROW, _SCALAR, (plgpu.RefType(),) * len(out))
        return _inline(registers.finish, types, result)(out, weight, highest, tuple(self.sums))

    def wait_for_turn(self) -> None:
        """Until the other warpgroup has started its products."""
        if self.take_turns:
            _inline(registers.wait_for_turn, (_SCALAR,))(self.warpgroup)

    def give_first_turn(self) -> None:
        pl.when(self.warpgroup == 1)(self.end_turn)

    def end_turn(self) -> None:
        if self.take_turns:
            _inline(registers.end_turn, (_SCALAR,))(self.warpgroup)

    def _visible(self, tile):
        slot = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=_MATRIX) + tile * self.shape[1]
        visible = slot < self.length
        if self.causal or self.window is not None:
            position = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=_MATRIX) + self.first_position
            if self.causal:
                visible &= slot <= position
            if self.window is not None:
                visible &= slot > position - self.window
        return visible


def _attend(tiles: _Tiles, begin, full_end, end, settle_every: int, highest):
    """P.V of a tile runs under the softmax of the next one. Returns the output."""

    def wait_for_keys(tile):
        pl.when(tile < end)(lambda: tiles.wait_for_keys(tile))

    def first(tile, carry):
        _, peak, *rest = carry

        def scores_of(acc):
            tiles.start_scores(acc, tile)
            return tiles.finish_scores(acc, tile, products_left=0)

        wait_for_keys(tile)
        scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef(tiles.shape))
        p, peak, _ = tiles.softmax(scores, tile, peak, masked=True)
        wait_for_keys(tile + 1)
        return tiles.operand(p), peak, *rest

    def step(tile, carry, *, masked: bool):
        """P.V of ``tile`` and the scores of the next one."""
        p, peak, settled_peak, out = carry

        def ahead(acc):
            tiles.start_scores(acc, tile + 1)
            running = tiles.start_products(out, p, tile)
            tiles.end_turn()
            scores = tiles.finish_scores(acc, tile + 1, products_left=len(running))
            next_p, new_peak, decay = tiles.softmax(scores, tile + 1, peak, masked=masked)
            # A branch: without one, the compiler waits for the products before the softmax.
            wait_for_keys(tile + 2)
            done = tiles.finish_products(running, tile)
            # Only now: until here the tensor cores read the registers of p.
            return tiles.operand(next_p), new_peak, decay, done

        tiles.wait_for_turn()
        next_p, new_peak, decay, out = pl.run_scoped(ahead, plgpu.WGMMAAccumulatorRef(tiles.shape))
        out = tiles.rescale(out, decay)
        now = lax.rem(tile - begin, jnp.int32(settle_every)) == settle_every - 1
        out = tiles.settle(out, jnp.exp2(settled_peak - new_peak), now.astype(jnp.int32))
        now = plgpu.layout_cast(lax.broadcast_in_dim(now, (BLOCK_Q,), ()), _ROW)
        return next_p, new_peak, jnp.where(now, new_peak, settled_peak), out

    def last(tile, carry):
        p, peak, settled_peak, out = carry

        return p, peak, settled_peak, tiles.finish_products(tiles.start_products(out, p, tile), tile)

    tiles.give_first_turn()
    lowest = plgpu.layout_cast(jnp.full((BLOCK_Q,), _LOWEST, jnp.float32), _ROW)
    zeros = [plgpu.layout_cast(jnp.zeros((BLOCK_Q, rows), jnp.float32), _MATRIX) for _, rows in tiles.parts]
    p = plgpu.layout_cast(jnp.zeros(tiles.shape, formats.E4M3), plgpu.Layout.WGMMA_8BIT)
    carry = (p, lowest, lowest, tuple(zeros))
    carry = lax.fori_loop(begin, jnp.minimum(begin + 1, end), first, carry)
    before_last = jnp.maximum(end - 1, begin)
    full_end = jnp.clip(full_end - 1, begin, before_last)
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full_end, before_last, functools.partial(step, masked=True), carry)
    _, peak, settled_peak, out = lax.fori_loop(before_last, end, last, carry)
    return tiles.normalized(out, jnp.exp2(settled_peak - peak), highest)


def _inline(f, arg_types: tuple[Any, ...], return_type: Any = None):
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(f)


def _like(matrix):
    return plgpu.ShapeDtypeStruct(matrix.shape, jnp.float32, layout=_MATRIX)


def _over_columns(x, shape: tuple[int, ...]):
    """One number for each row -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))
