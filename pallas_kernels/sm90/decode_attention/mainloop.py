"""A warpgroup's way through its tiles: TMA into its ring, S^T = K Q^T, softmax, O^T += V^T P^T."""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat
from pallas_kernels.sm90.attention.operands import swizzle
from pallas_kernels.sm90.common.ptx import ROWS, SCALAR
from pallas_kernels.sm90.decode_attention import registers
from pallas_kernels.sm90.decode_attention.config import Config, Problem

COPY_ROW = 256  # bytes of a row as TMA sees it, its longest; tokens' own rows are shorter
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one number for each query row, which is a column of S^T and O^T


class Operands(NamedTuple):
    """Inputs in global memory; a cache in pages has those in place of sequences."""

    q: Any  # E4M3 [B, T, heads, H]
    q_scale: Any  # float32 [B, T, heads]
    k: Any  # uint8 [B, kv_heads, S * H / 2 / COPY_ROW, COPY_ROW]: two codes a byte
    k_scale: Any  # bf16 [B, kv_heads, S]
    v: Any
    v_scale: Any
    query_start: Any  # int32 [B]
    kv_lengths: Any  # int32 [B]
    page_table: Any = None  # int32 [B, pages], where the cache is in pages
    sinks: Any = None  # float32 [T, heads] in units of log2, where there are some


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, in the order in which they are allocated.

    A ring has ``stages`` places for each warpgroup; what is ``full`` TMA has filled.
    """

    done: Any  # barrier: every warpgroup has written its row_max and row_sum
    k_full: Any  # barriers [ring]: keys and their scales
    k_scale: Any  # bf16 [ring, block_kv]
    k: Any  # uint8 [ring, block_kv * H / 2 / COPY_ROW, COPY_ROW]
    out: Any  # float32 [H, rows], handed from one warpgroup to the next
    p: Any  # E4M3 [warpgroups, rows, block_kv]
    row_max: Any  # float32 [warpgroups, rows]
    q_full: Any  # barrier: the queries
    q: Any  # E4M3 [rows, H]
    reduction: Any  # float32 [warpgroups, 512]
    row_sum: Any  # float32 [warpgroups, rows]
    turns: Any  # barriers [warpgroups]: the sum of the warpgroups up to this one is in ``out``
    v_full: Any  # as those of the keys
    v_scale: Any
    v: Any


class Block(NamedTuple):
    """Which rows a warpgroup serves, and which of the sequence's splits it reads."""

    batch: jax.Array
    split: jax.Array
    warpgroup: jax.Array
    kv_head: jax.Array
    first_row: jax.Array
    first_head: jax.Array  # of the query heads that share the kv head


class State(NamedTuple):
    """What a warpgroup has of each row after some tiles."""

    row_max: jax.Array  # [rows], the greatest score + log2(value's scale)
    row_sum: jax.Array  # sum of exp2(score - row_max): [block_kv, rows], at last [rows]
    out: jax.Array  # [H, rows], the sum of values times exp2(score - row_max) * PROBABILITY_SCALE / CODE_UNIT


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles ``begin`` to ``end`` of a sequence, which one warpgroup reads; all rows see all of those before
    ``full_end``."""

    operands: Operands
    scratch: Scratch
    config: Config
    problem: Problem
    block: Block
    length: jax.Array  # valid slots of the sequence
    start: jax.Array  # position of its first query
    begin: jax.Array
    full_end: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, operands: Operands, scratch: Scratch, config: Config, problem: Problem, block: Block) -> Self:
        """This warpgroup's part of the tiles that some row of the block sees."""
        group, block_kv, window = problem.group, config.block_kv, problem.softmax.window
        length = operands.kv_lengths[block.batch]
        # Rows of this block are the queries at these positions, first and last.
        start = operands.query_start[block.batch]
        position = start + lax.div(block.first_row, jnp.int32(group))
        last = start + lax.div(block.first_row + problem.block_rows - 1, jnp.int32(group))
        end_tile = pl.cdiv(jnp.minimum(length, last + 1), jnp.int32(block_kv))
        first_tile = jnp.int32(0)
        if window is not None:
            first_tile = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(block_kv))
        tiles = jnp.maximum(end_tile - first_tile, 0)
        part = block.split * config.warpgroups + block.warpgroup
        parts = jnp.int32(lax.axis_size("split") * config.warpgroups)
        begin = first_tile + lax.div(part * tiles, parts)
        end = first_tile + lax.div((part + 1) * tiles, parts)
        full_slots = jnp.minimum(length, position + 1) if window is None else jnp.int32(0)
        full_end = jnp.clip(lax.div(full_slots, jnp.int32(block_kv)), begin, jnp.maximum(begin, end))
        return cls(operands, scratch, config, problem, block, length, start, begin, full_end, end)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile's scores, S^T."""
        return self.config.block_kv, self.problem.block_rows

    def stage(self, tile):
        """The tile's place in the ring."""
        stages = self.config.stages
        return self.block.warpgroup * stages + lax.rem(tile - self.begin, jnp.int32(stages))

    def fetch_first(self) -> None:
        """Fill the ring but for the place of the tile that the first step asks for."""
        for i in range(self.config.stages - 1):
            pl.when(self.begin + i < self.end)(functools.partial(self.fetch, self.begin + i))

    def fetch_ahead(self, tile) -> None:
        """The tile that follows in the place of the one before ``tile``, which every thread has read by now."""
        stages = self.config.stages
        pl.when(tile + stages - 1 < self.end)(functools.partial(self.fetch, tile + stages - 1))

    def fetch(self, tile) -> None:
        """Ask TMA for a tile."""
        stage, scratch, operands = self.stage(tile), self.scratch, self.operands
        block_kv, page_size = self.config.block_kv, self.problem.page_size
        if page_size is None:
            page, offset = self.block.batch, tile * block_kv
        else:
            page = operands.page_table[self.block.batch, lax.div(tile * block_kv, jnp.int32(page_size))]
            offset = lax.rem(tile * block_kv, jnp.int32(page_size))
        first_copy_row = lax.div(offset, jnp.int32(2 * COPY_ROW // self.problem.head_dim))
        codes = (page, self.block.kv_head, pl.ds(first_copy_row, scratch.k.shape[1]))
        scales = (page, self.block.kv_head, pl.ds(offset, block_kv))
        plgpu.copy_gmem_to_smem(operands.k.at[codes], scratch.k.at[stage], scratch.k_full.at[stage])
        plgpu.copy_gmem_to_smem(operands.k_scale.at[scales], scratch.k_scale.at[stage], scratch.k_full.at[stage])
        plgpu.copy_gmem_to_smem(operands.v.at[codes], scratch.v.at[stage], scratch.v_full.at[stage])
        plgpu.copy_gmem_to_smem(operands.v_scale.at[scales], scratch.v_scale.at[stage], scratch.v_full.at[stage])

    def scores(self, stage, row_to_scores):
        """S^T of the tile in a stage, in units of log2, capped."""
        plgpu.barrier_wait(self.scratch.k_full.at[stage])
        keys = self._load_codes(registers.load_keys, self.scratch.k.at[stage], self.shape[0], self.problem.head_dim)
        scores = _multiply(keys, self.scratch.q)
        k_scale = jax_compat.load_registers(self.scratch.k_scale.at[stage], ROWS).astype(jnp.float32)
        scores = scores * lax.broadcast_in_dim(k_scale, self.shape, (0,)) * row_to_scores
        softcap = self.problem.softmax.softcap
        return scores if softcap is None else jnp.tanh(scores) * softcap

    def value_scales(self, stage, tile, *, masked: bool):
        """The scales of a tile's values, and their log2; 0 and -inf beyond the sequence's end."""
        plgpu.barrier_wait(self.scratch.v_full.at[stage])
        scale = jax_compat.load_registers(self.scratch.v_scale.at[stage], ROWS).astype(jnp.float32)
        log_scale = jnp.log2(scale)
        if masked:
            # Slots beyond the end may hold anything; a NaN would survive the product with P = 0.
            block_kv = self.config.block_kv
            slot = plgpu.broadcasted_iota(jnp.int32, (block_kv,), 0, layout=ROWS) + tile * block_kv
            scale = jnp.where(slot < self.length, scale, 0.0)
            log_scale = jnp.where(slot < self.length, log_scale, -jnp.inf)
        return scale, log_scale

    def values_times(self, stage, p):
        """V^T P^T of the tile in a stage."""
        values = self._load_codes(registers.load_values, self.scratch.v.at[stage], self.problem.head_dim, self.shape[0])
        return _multiply(values, p)

    def _load_codes(self, load, ref, *shape: int):
        """E4M3 array in WGMMA_8BIT layout, dequantized from shared memory by ``load``."""
        result = plgpu.ShapeDtypeStruct(shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
        load = functools.partial(load, head_dim=self.problem.head_dim)
        return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(load)(ref)


def attend(tiles: Tiles, row_to_scores) -> State:
    """Online softmax over a warpgroup's tiles."""
    (block_kv, rows), head_dim = tiles.shape, tiles.problem.head_dim
    p_smem, reduction = (x.at[tiles.block.warpgroup] for x in (tiles.scratch.p, tiles.scratch.reduction))
    is_visible = _mask(tiles)

    def step(tile, state: State, *, masked: bool) -> State:
        stage = tiles.stage(tile)
        scores = tiles.scores(stage, row_to_scores)
        if masked:
            scores = jnp.where(is_visible(tile), scores, -jnp.inf)
        v_scale, log_v_scale = tiles.value_scales(stage, tile, masked=masked)
        weighted = scores + lax.broadcast_in_dim(log_v_scale, tiles.shape, (0,))
        row_max = jnp.maximum(state.row_max, reduce_rows("max", weighted, reduction))
        # Until a row sees its first slot its maximum is -inf, and -inf - -inf would be NaN.
        safe_max = jnp.where(row_max == -jnp.inf, 0.0, row_max) if masked else row_max
        decay = jnp.exp2(state.row_max - safe_max)
        p = jnp.exp2(scores - over_rows(safe_max, block_kv))
        row_sum = state.row_sum * over_rows(decay, block_kv) + p
        p *= lax.broadcast_in_dim(v_scale * formats.PROBABILITY_SCALE, tiles.shape, (0,))
        _store_probabilities(p, p_smem)
        plgpu.commit_smem()
        tiles.fetch_ahead(tile)
        product = tiles.values_times(stage, p_smem)
        return State(row_max, row_sum, state.out * over_rows(decay, head_dim) + product)

    def full(value: float, shape: tuple[int, ...], layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    state = State(
        full(-jnp.inf, (rows,), COLUMNS),
        full(0.0, tiles.shape, plgpu.Layout.WGMMA),
        full(0.0, (head_dim, rows), plgpu.Layout.WGMMA),
    )
    state = lax.fori_loop(tiles.begin, tiles.full_end, functools.partial(step, masked=False), state)
    state = lax.fori_loop(tiles.full_end, tiles.end, functools.partial(step, masked=True), state)
    return state._replace(row_sum=reduce_rows("add", state.row_sum, reduction))


def _mask(tiles: Tiles):
    """Which slots of a tile each row sees, as a function of the tile; what it needs of all tiles is computed here."""
    problem, window = tiles.problem, tiles.problem.softmax.window
    slot_in_tile = plgpu.broadcasted_iota(jnp.int32, tiles.shape, 0, layout=plgpu.Layout.WGMMA)
    row = tiles.block.first_row + plgpu.broadcasted_iota(jnp.int32, tiles.shape, 1, layout=plgpu.Layout.WGMMA)
    position = tiles.start + lax.div(row, jnp.int32(problem.group))

    def is_visible(tile):
        slot = slot_in_tile + tile * tiles.config.block_kv
        visible = (slot < tiles.length) & (slot <= position)
        if window is not None:
            visible &= slot > position - window
        return visible

    return is_visible


def load_numbers(block: Block, numbers, problem: Problem):
    """Start to load one of the float32 numbers [T, heads] for each of a block's rows."""
    result = plgpu.ShapeDtypeStruct((problem.block_rows,), jnp.float32, layout=COLUMNS)
    load = functools.partial(registers.load_row_numbers, rows=problem.block_rows, group=problem.group)
    load = plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType()), return_type=result)(load)
    return load(block.first_row, block.first_head, numbers)


def over_rows(x, rows: int):
    """[N] -> [rows, N]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def reduce_rows(operation: str, x, scratch):
    """[rows, N] -> [N] over the warpgroup's four warps; ``jnp.max``'s scratch is the whole block's."""

    def reduce(_, x, scratch):
        return x.reduce(operation, 0, scratch)

    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout=COLUMNS)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)(reduce)(x, scratch)


def _multiply(a, b):
    """a b^T in float32: ``a`` [M, K] in registers, ``b`` [N, K] in shared memory."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, jax_compat.transpose_ref(b))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0])))


def _store_probabilities(p, p_smem) -> None:
    arg_types = (plgpu.Layout.WGMMA, plgpu.RefType(swizzle(128)))
    plgpu.inline_mgpu(arg_types=arg_types)(registers.store_probabilities)(p, p_smem)
