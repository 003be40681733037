"""A consumer's way through its tiles: Q K^T, softmax and P V, in either of two pipelines; ``launch`` describes them."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.sm90.attention.operands import Softmax, swizzle
from pallas_kernels.sm90.common.ptx import ROWS
from pallas_kernels.sm90.prefill_attention import prepare, registers
from pallas_kernels.sm90.prefill_attention.config import BLOCK_Q, PRODUCT_KEYS, SUM_COLUMNS, SUM_STEP

_MATRIX = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one number for each key; ROWS: for each query
# log2 of how far a tile's unit may lie below the largest: what was summed before grows by as much.
_MAX_RANGE = 32.0


class Operands(NamedTuple):
    """Inputs in global memory; columns are slots, rounded up to whole tiles."""

    q: Any  # E4M3 [B, T8, heads, H]
    q_scale: Any  # float32 [B, T, heads]
    k: Any  # E4M3 [B, kv_heads, columns, H]
    v: Any  # E4M3 [B, kv_heads, H and the config's sum_columns, columns]
    columns: Any  # float32 [B, kv_heads, 3, columns]: the numbers of ``prepare``
    query_start: Any  # int32 [B]
    kv_lengths: Any  # int32 [B]
    sinks: Any = None  # float32 [heads] in units of log2, where there are some


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, in the order in which they are allocated.

    What is ``full`` the producer has filled, and what is ``free`` the consumers have read.
    """

    columns: Any  # float32 [stages, 3, keys]
    free: Any  # barriers [stages]
    full: Any  # barriers [stages]
    k: Any  # E4M3 [stages, keys, H]
    out: Any  # [consumers, queries, H]
    q_free: Any  # barriers [consumers]
    q_full: Any  # barriers [consumers]
    q: Any  # E4M3 [consumers, queries, H]
    turns: Any  # barriers [consumers]
    v: Any  # E4M3 [stages, H and the config's sum_columns, keys]


class RowMax(NamedTuple):
    """Greatest exponents of a row."""

    last: jax.Array  # of the last tile: the unit of the row sums and the output
    floor: jax.Array  # the least that a tile's may be: ``_MAX_RANGE`` below that of all tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a compute warpgroup does with a tile; the order is the pipelines' affair."""

    scratch: Scratch
    q: Any  # [queries, H]
    q_free: Any
    turn: Any  # this consumer's barrier
    other_turn: Any  # the other's
    first: jax.Array  # tile of the block of queries
    done: jax.Array  # tiles that went through the ring before it
    to_scores: jax.Array  # [queries]: the softmax's times the query's scale
    first_position: jax.Array
    length: jax.Array
    softmax: Softmax
    zero_scores: jax.Array  # [queries, keys]
    zero_product: jax.Array  # [queries, rows of v]

    @property
    def shape(self) -> tuple[int, int]:
        return BLOCK_Q, self.scratch.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.scratch.k.shape[2]

    def stage(self, tile):
        """The tile's place in the ring."""
        return lax.rem(self.done + tile - self.first, jnp.int32(self.scratch.k.shape[0]))

    # Waiting is a branch. Callers wait before they start a product from zeros: a branch between these and the product
    # would make the compiler write all of the zeros to registers.
    def wait(self, tile) -> None:
        """Until the tile has arrived."""
        plgpu.barrier_wait(self.scratch.full.at[self.stage(tile)])

    def release(self, tile) -> None:
        """Let the producer fill the tile's place again."""
        plgpu.barrier_arrive(self.scratch.free.at[self.stage(tile)])

    def release_queries(self) -> None:
        """Let the producer load the next block's queries."""
        plgpu.barrier_arrive(self.q_free)

    # Turns cannot deadlock: both consumers take one in each tile, even if none of their queries sees it or exists, and
    # between taking a turn and passing it on a consumer waits for its own products alone. The tiles and queries that
    # it waits for before a turn depend only on what was released after earlier turns.
    def take_turn(self) -> None:
        """Wait until the other consumer has its product P V."""
        plgpu.barrier_wait(self.turn)

    def pass_turn(self) -> None:
        """Let the other consumer start its products."""
        plgpu.barrier_arrive(self.other_turn)

    def start_scores(self, tile):
        """Q K^T in flight, in units of the codes; :meth:`finish` waits for it."""
        ref, result = plgpu.RefType(swizzle(self.head_dim)), matrix(self.shape[1])
        start = plgpu.inline_mgpu(arg_types=(ref, ref, _MATRIX), return_type=result)(registers.start_product)
        return start(self.q, self.scratch.k.at[self.stage(tile)], self.zero_scores)

    def start_product(self, p, tile, first=None):
        """P V in flight; with ``first``, the product in flight of as many keys before, added to that."""
        keys = p.shape[1]
        types = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzle(PRODUCT_KEYS)), _MATRIX)
        start = functools.partial(registers.start_product, in_flight=first is not None)
        start = plgpu.inline_mgpu(arg_types=types, return_type=matrix(self.scratch.v.shape[1]))(start)
        v = self.scratch.v.at[self.stage(tile), :, pl.ds(0 if first is None else keys, keys)]
        return start(p, v, self.zero_product if first is None else first)

    def finish(self, product, *, later: int = 0):
        """A product in flight, once at most ``later`` that were started after it still run."""
        finish = functools.partial(registers.finish_product, later=later)
        return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=matrix(product.shape[1]))(finish)(product)

    def exponents(self, scores, tile, row_max: RowMax, key_scale, *, masked: bool):
        """log2 of P, the new row_max, and the factor that brings what was summed before to the new unit.

        P = exp2(score + log2(v_scale) - row_max) * PROBABILITY_SCALE, so that the largest term of a
        tile is exact in E4M3 whatever other tiles hold.
        """
        scores *= over_rows(key_scale, self.shape)
        scores = scores * over_columns(self.to_scores, self.shape)
        if self.softmax.softcap is not None:
            scores = jnp.tanh(scores) * self.softmax.softcap
        scores += over_rows(self.load_column(tile, prepare.LOG_VALUE_SCALE), self.shape)
        if masked:
            scores = jnp.where(self._visible(tile), scores, -jnp.inf)
        tile_max = jnp.max(scores, axis=1)
        last = jnp.maximum(tile_max, row_max.floor)
        # Until a row sees its first key its maximum is -inf, and -inf - -inf would be NaN.
        unit = jnp.where(last == -jnp.inf, 0.0, last) if masked else last
        decay = jnp.exp2(row_max.last - unit)
        exponents = scores - over_columns(unit - math.log2(formats.PROBABILITY_SCALE), self.shape)
        return exponents, RowMax(last, jnp.maximum(row_max.floor, tile_max - _MAX_RANGE)), decay

    def load_column(self, tile, which: int):
        """One of the numbers for each key of a tile that has arrived."""
        ref = self.scratch.columns.at[self.stage(tile), which]
        result = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=_COLUMNS)
        load = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(registers.load_columns)
        return load(ref)

    def _visible(self, tile):
        slot = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=_MATRIX) + tile * self.shape[1]
        position = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=_MATRIX) + self.first_position
        # One comparison an element: the lesser bound is a row's.
        visible = slot < (jnp.minimum(position + 1, self.length) if self.softmax.causal else self.length)
        if self.softmax.window is not None:
            visible &= slot > position - self.softmax.window
        return visible


def one_by_one(tiles: Tiles, begin, full_end, end):
    """Pipeline 1: the products of a tile wait for its softmax. Returns each row's unit, row sum and output."""

    def step(tile, carry, *, masked: bool):
        row_max, row_sum, out = carry
        tiles.wait(tile)
        scores = tiles.finish(tiles.start_scores(tile))
        key_scale = tiles.load_column(tile, prepare.KEY_SCALE)
        exponents, row_max, decay = tiles.exponents(scores, tile, row_max, key_scale, masked=masked)
        p = jnp.exp2(exponents)
        inverse_scale = tiles.load_column(tile, prepare.INVERSE_VALUE_SCALE)
        row_sum = row_sum * decay + jnp.sum(p * over_rows(inverse_scale, tiles.shape), axis=1)
        product = tiles.finish(tiles.start_product(_operand(p), tile))
        out = out * over_columns(decay, out.shape) + product
        tiles.release(tile)
        return row_max, row_sum, out

    carry = _lowest(), plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), ROWS), _zeros(tiles.head_dim)
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full_end, end, functools.partial(step, masked=True), carry)
    tiles.release_queries()
    row_max, row_sum, out = carry
    return row_max.last, row_sum, out


def overlapped(tiles: Tiles, begin, full_end, end):
    """Pipeline 2: P V begins under the softmax, and Q K^T of the next tile follows it at once; returns likewise."""

    def first(tile, carry):
        del carry
        tiles.wait(tile)
        return tiles.finish(tiles.start_scores(tile)), tiles.load_column(tile, prepare.KEY_SCALE)

    def step(tile, carry, *, masked: bool, last: bool):
        scores, key_scale, row_max, sums, out = carry
        exponents, row_max, decay = tiles.exponents(scores, tile, row_max, key_scale, masked=masked)
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
        sums = (
            sums * over_columns(decay, sums.shape)
            + tile_sums * tiles.scratch.columns[tiles.stage(tile), prepare.UNIT, 0]
        )
        out = out * over_columns(decay, out.shape) + product
        tiles.release(tile)
        if not last:
            # Loaded under Q.K^T; the rest of the tile's numbers would not fit beside its scores.
            key_scale = tiles.load_column(tile + 1, prepare.KEY_SCALE)
            scores = tiles.finish(scores)
        return scores, key_scale, row_max, sums, out

    no_scale = plgpu.layout_cast(jnp.zeros(tiles.shape[1:], jnp.float32), _COLUMNS)
    ahead = lax.fori_loop(begin, jnp.minimum(begin + 1, end), first, (_zeros(tiles.shape[1]), no_scale))
    before_last = jnp.maximum(end - 1, begin)
    full_end = jnp.minimum(full_end, before_last)
    carry = *ahead, _lowest(), _zeros(SUM_COLUMNS), _zeros(tiles.head_dim)
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False, last=False), carry)
    carry = lax.fori_loop(full_end, before_last, functools.partial(step, masked=True, last=False), carry)
    tiles.release_queries()
    *_, row_max, sums, out = lax.fori_loop(before_last, end, functools.partial(step, masked=True, last=True), carry)
    column = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=_MATRIX).astype(jnp.float32)
    return row_max.last, jnp.sum(sums * jnp.exp2(-math.log2(SUM_STEP) * column), axis=1), out


def matrix(columns: int):
    """The type of a float32 matrix with a row a query."""
    return plgpu.ShapeDtypeStruct((BLOCK_Q, columns), jnp.float32, layout=_MATRIX)


def _lowest():
    """Maxima before the first tile."""
    lowest = plgpu.layout_cast(jnp.full((BLOCK_Q,), -jnp.inf, jnp.float32), ROWS)
    return RowMax(lowest, lowest)


def _zeros(columns: int):
    """A matrix before the first tile."""
    return plgpu.layout_cast(jnp.zeros((BLOCK_Q, columns), jnp.float32), _MATRIX)


def _operand(p):
    """P in E4M3, as an A operand."""
    result = plgpu.ShapeDtypeStruct(p.shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
    return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(registers.probabilities_to_operand)(p)


def _split(x, column: int):
    """A matrix in front of ``column`` and from there on."""
    result = matrix(column), matrix(x.shape[1] - column)
    split = functools.partial(registers.split_columns, column=column)
    return plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)(split)(x)


def over_rows(x, shape: tuple[int, ...]):
    """One number for each column -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (1,))


def over_columns(x, shape: tuple[int, ...]):
    """One number for each row -> a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))
