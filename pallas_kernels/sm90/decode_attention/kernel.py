"""One thread block of the decode kernel, and the shared memory that it needs; ``launch`` describes both."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sm90.attention.operands import swizzle, swizzled
from pallas_kernels.sm90.common.ptx import SCALAR
from pallas_kernels.sm90.decode_attention import registers
from pallas_kernels.sm90.decode_attention.config import Config, Problem
from pallas_kernels.sm90.decode_attention.epilogue import Outputs, finish
from pallas_kernels.sm90.decode_attention.mainloop import (
    COPY_ROW,
    Block,
    Operands,
    Scratch,
    Tiles,
    attend,
    load_numbers,
    over_rows,
)


def scratch_types(config: Config, problem: Problem) -> Scratch:
    """The shared memory and barriers of a thread block."""
    head_dim, rows, warpgroups = problem.head_dim, problem.block_rows, config.warpgroups
    ring = warpgroups * config.stages
    codes = plgpu.SMEM((ring, config.block_kv * head_dim // 2 // COPY_ROW, COPY_ROW), jnp.uint8)
    scales = plgpu.SMEM((ring, config.block_kv), jnp.bfloat16)
    numbers = plgpu.SMEM((warpgroups, rows), jnp.float32)
    full = plgpu.Barrier(num_arrivals=2, num_barriers=ring)
    return Scratch(
        done=plgpu.Barrier(num_arrivals=warpgroups),
        k_full=full,
        k_scale=scales,
        k=codes,
        out=plgpu.SMEM((head_dim, rows), jnp.float32),
        p=swizzled((warpgroups, rows, config.block_kv)),
        row_max=numbers,
        q_full=plgpu.Barrier(),
        q=swizzled((rows, head_dim)),
        reduction=plgpu.SMEM((warpgroups, 512), jnp.float32),
        row_sum=numbers,
        turns=plgpu.Barrier(num_barriers=warpgroups),
        v_full=full,
        v_scale=scales,
        v=codes,
    )


def kernel(operands: Operands, outputs: Outputs, scratch: Scratch, *, config: Config, problem: Problem) -> None:
    """One block: attention of ``problem.block_rows`` rows over one range of a sequence's slots."""
    block = _this_block(problem)
    # Asked for before the first tiles, behind which they would wait.
    queries, q_scale = _load_queries(block, operands, problem)
    tiles = Tiles.of(operands, scratch, config, problem, block)
    tiles.fetch_first()
    pl.when(block.warpgroup == 0)(functools.partial(_store_queries, block, queries, scratch, problem))
    row_to_scores = over_rows(q_scale * problem.softmax.to_scores, config.block_kv)
    plgpu.barrier_wait(scratch.q_full)
    state = attend(tiles, row_to_scores)
    finish(state, block, operands.sinks, outputs, scratch, problem)


def _this_block(problem: Problem) -> Block:
    batch, split, warpgroup = (lax.axis_index(name) for name in ("batch", "split", "warpgroup"))
    kv_head = lax.div(lax.axis_index("head"), jnp.int32(problem.row_blocks))
    row_block = lax.rem(lax.axis_index("head"), jnp.int32(problem.row_blocks))
    return Block(batch, split, warpgroup, kv_head, row_block * problem.block_rows, kv_head * problem.group)


def _load_queries(block: Block, operands: Operands, problem: Problem):
    """Start to load a block's queries, as raw words, and their scales."""
    layout = registers.query_layout(problem.block_rows, problem.head_dim)
    raw = plgpu.ShapeDtypeStruct((problem.block_rows * problem.head_dim // 4,), jnp.int32, layout=layout)
    load = functools.partial(registers.load_queries, rows=problem.block_rows, group=problem.group)
    load = plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType()), return_type=raw)(load)
    q, q_scale = operands.q.at[block.batch], operands.q_scale.at[block.batch]
    return load(block.first_row, block.first_head, q), load_numbers(block, q_scale, problem)


def _store_queries(block: Block, queries, scratch: Scratch, problem: Problem) -> None:
    """Queries from registers to shared memory, once for all warpgroups."""
    head_dim = problem.head_dim
    store = functools.partial(registers.store_queries, valid_rows=problem.rows, head_dim=head_dim)
    types = (SCALAR, registers.query_layout(problem.block_rows, head_dim), plgpu.RefType(swizzle(head_dim)))
    plgpu.inline_mgpu(arg_types=types)(store)(block.first_row, queries, scratch.q)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.q_full)
