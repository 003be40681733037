"""One thread block of the prefill kernel: which queries it takes, and what its producer and consumers do."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.sm90.attention.operands import Softmax, swizzled
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.common.ptx import ROWS, SCALAR
from pallas_kernels.sm90.prefill_attention import registers
from pallas_kernels.sm90.prefill_attention.config import BLOCK_Q, PRODUCT_KEYS, WARPGROUPS, Config
from pallas_kernels.sm90.prefill_attention.mainloop import (
    Operands,
    Scratch,
    Tiles,
    matrix,
    one_by_one,
    over_columns,
    overlapped,
)
from pallas_kernels.sm90.prefill_attention.schedule import Schedule

BLOCK_ROWS = WARPGROUPS * BLOCK_Q  # queries of a thread block
# Registers a thread: the producer gives what it does not need to the consumers.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 24, 240


def scratch_types(config: Config, head_dim: int, out_dtype: jax.typing.DTypeLike) -> Scratch:
    """The shared memory and barriers of a thread block."""
    stages, block_kv = config.stages, config.block_kv
    return Scratch(
        columns=plgpu.SMEM((stages, 3, block_kv), jnp.float32),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        k=swizzled((stages, block_kv, head_dim)),
        out=swizzled((WARPGROUPS, BLOCK_Q, head_dim), out_dtype),
        q_free=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        q=swizzled((WARPGROUPS, BLOCK_Q, head_dim)),
        turns=plgpu.Barrier(num_barriers=WARPGROUPS),
        v=swizzled((stages, head_dim + config.sum_columns, block_kv), columns=PRODUCT_KEYS),
    )


def kernel(
    operands: Operands, out_gmem, scratch: Scratch, *, config: Config, schedule: Schedule, softmax: Softmax
) -> None:
    """One thread block: its share of the blocks of ``BLOCK_ROWS`` queries of one head."""
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    work = _Work(operands, out_gmem.shape, config, schedule, softmax, cta, schedule.visits(cta))
    pl.when(warpgroup == WARPGROUPS)(functools.partial(_produce, work, scratch))
    pl.when(warpgroup < WARPGROUPS)(functools.partial(_consume, work, warpgroup, out_gmem, scratch))


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
class _Work:
    """The ``count`` blocks of queries that a thread block visits."""

    operands: Operands
    out_shape: tuple[int, ...]  # [B, T, heads, H]
    config: Config
    schedule: Schedule
    softmax: Softmax
    cta: jax.Array
    count: jax.Array

    def block(self, i) -> _Block:
        """The i-th, or the last again. Heads that share keys are neighbours, and the longest come first."""
        batches, length, heads, _ = self.out_shape
        index = self.schedule.visited(self.cta, jnp.minimum(i, self.count - 1))
        rest, head = lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads))
        batch = lax.rem(rest, jnp.int32(batches))
        # The last queries see the most keys.
        first_row = (pl.cdiv(length, BLOCK_ROWS) - 1 - lax.div(rest, jnp.int32(batches))) * BLOCK_ROWS
        return _Block(batch, head, first_row, self.operands.query_start[batch], self.operands.kv_lengths[batch])

    def kv_head(self, block: _Block):
        """The block's keys' head."""
        return lax.div(block.head, jnp.int32(self.out_shape[2] // self.operands.k.shape[1]))

    def tile_range(self, block: _Block):
        """The first tile that a query of the block sees, the first that not all see, and the end."""
        causal, window, block_kv = self.softmax.causal, self.softmax.window, self.config.block_kv
        end_slot = jnp.minimum(block.length, block.position + BLOCK_ROWS) if causal else block.length
        end = pl.cdiv(end_slot, jnp.int32(block_kv))
        begin = jnp.int32(0)
        if window is not None:
            begin = lax.div(jnp.maximum(block.position - (window - 1), 0), jnp.int32(block_kv))
        begin = jnp.minimum(begin, end)
        full_slots = jnp.minimum(block.length, block.position + 1) if causal else block.length
        full_end = jnp.clip(lax.div(full_slots, jnp.int32(block_kv)), begin, end) if window is None else begin
        return begin, full_end, end


def _produce(work: _Work, scratch: Scratch) -> None:
    """The producer: queries of one block after the other, and the tiles of keys and values that they see."""
    plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
    operands, config = work.operands, work.config

    def visit(i, done):
        block = work.block(i)
        kv_head = work.kv_head(block)
        begin, _, end = work.tile_range(block)
        for w in range(WARPGROUPS):
            pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(scratch.q_free.at[w]))
            rows = pl.ds(block.first_row + w * BLOCK_Q, BLOCK_Q)
            q = operands.q.at[block.batch, rows, block.head]
            plgpu.copy_gmem_to_smem(q, scratch.q.at[w], scratch.q_full.at[w])

        def copy(tile, done):
            stage = lax.rem(done, jnp.int32(config.stages))
            slots = pl.ds(tile * config.block_kv, config.block_kv)
            pl.when(done >= config.stages)(lambda: plgpu.barrier_wait(scratch.free.at[stage]))
            sources = (
                (operands.k.at[block.batch, kv_head, slots], scratch.k),
                (operands.columns.at[block.batch, kv_head, :, slots], scratch.columns),
                (operands.v.at[block.batch, kv_head, :, slots], scratch.v),
            )
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target.at[stage], scratch.full.at[stage])
            return done + 1

        return lax.fori_loop(begin, end, copy, done)

    lax.fori_loop(0, work.count, visit, jnp.int32(0))


def _consume(work: _Work, warpgroup, out_gmem, scratch: Scratch) -> None:
    """A consumer: attention of its half of each block's queries."""
    plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
    offset = warpgroup * BLOCK_Q  # in a block
    run = one_by_one if work.config.pipeline == 1 else overlapped

    def row_to_scores(block: _Block):
        q_scale = work.operands.q_scale.at[block.batch]
        return _load_rows(block.first_row + offset, block.head, q_scale) * work.softmax.to_scores

    def visit(i, carry):
        block, to_scores, done = carry
        following = work.block(i + 1)
        begin, full_end, end = work.tile_range(block)
        plgpu.barrier_wait(scratch.q_full.at[warpgroup])
        tiles = Tiles(
            scratch=scratch, q=scratch.q.at[warpgroup], q_free=scratch.q_free.at[warpgroup],
            turn=scratch.turns.at[warpgroup], other_turn=scratch.turns.at[1 - warpgroup], first=begin, done=done,
            to_scores=to_scores, first_position=block.position + offset, length=block.length, softmax=work.softmax,
            zero_scores=zero_scores, zero_product=zero_product,
        )  # fmt: skip
        unit, row_sum, out = run(tiles, begin, full_end, end)
        if work.operands.sinks is not None:
            row_sum += jnp.exp2(work.operands.sinks[block.head] - unit) * formats.PROBABILITY_SCALE
        following_to_scores = row_to_scores(following)
        _store_output(out, row_sum, block, offset, scratch.out.at[warpgroup], out_gmem)
        return following, following_to_scores, done + end - begin

    zero_scores, zero_product = _zeros(work.config.block_kv), _zeros(scratch.v.shape[1])
    # The first turn is the first warpgroup's.
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(scratch.turns.at[0]))
    first = work.block(0)
    lax.fori_loop(0, work.count, visit, (first, row_to_scores(first), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _store_output(out, row_sum, block: _Block, offset, out_smem, out_gmem) -> None:
    """The epilogue of a block: normalized rows to shared memory, from where TMA takes them."""
    inverse = jnp.where(row_sum > 0, 1.0 / (jnp.where(row_sum > 0, row_sum, 1.0) * CODE_UNIT), 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = (out * over_columns(inverse, out.shape)).astype(out_smem.dtype)
    plgpu.commit_smem()
    rows = pl.ds(pl.multiple_of(block.first_row + offset, BLOCK_Q), BLOCK_Q)
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[block.batch, rows, block.head])


def _load_rows(first_row, head, numbers):
    """One of the float32 numbers [T, heads] for each of a consumer's queries."""
    result = plgpu.ShapeDtypeStruct((BLOCK_Q,), jnp.float32, layout=ROWS)
    load = plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType()), return_type=result)(registers.load_rows)
    return load(first_row, head, numbers)


def _zeros(columns: int):
    """An accumulator's start, made once for all of its products."""
    make = functools.partial(registers.zeros, shape=(BLOCK_Q, columns))
    return plgpu.inline_mgpu(arg_types=(), return_type=matrix(columns))(make)()
