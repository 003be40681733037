"""The end of a thread block: its warpgroups' results become one, and go to global memory."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.common.ptx import SCALAR
from pallas_kernels.sm90.decode_attention import registers
from pallas_kernels.sm90.decode_attention.config import Problem
from pallas_kernels.sm90.decode_attention.mainloop import COLUMNS, Block, Scratch, State, load_numbers, over_rows

# The output [B, T, heads, H] where no sequence is split. Else each split's, unnormalized and relative to its own
# maxima: float32 [B, kv_heads, splits, 1, rows, H], and these and the sums, [B, kv_heads, splits, rows].
Outputs = tuple[Any, ...]


def finish(state: State, block: Block, sinks, outputs: Outputs, scratch: Scratch, problem: Problem) -> None:
    """Bring the warpgroups' results to their common maximum and add them up, one after the other; the last stores."""
    row_max, row_sum, weight = _merge(state, block, sinks, scratch, problem)
    out = state.out * over_rows(weight, problem.head_dim)
    warpgroups = scratch.row_max.shape[0]
    for i in range(warpgroups):

        @pl.when(block.warpgroup == i)
        def _add(i=i):
            result = out
            if i > 0:
                plgpu.barrier_wait(scratch.turns.at[i - 1])
                result += jax_compat.load_registers(scratch.out, plgpu.Layout.WGMMA)
            if i + 1 < warpgroups:
                jax_compat.store_registers(scratch.out, result)
                plgpu.barrier_arrive(scratch.turns.at[i])
            else:
                _store(result, row_max, row_sum, block, outputs, problem)


def _merge(
    state: State, block: Block, sinks, scratch: Scratch, problem: Problem
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The block's row maxima and row sums, and what this warpgroup's output is to be multiplied by."""
    own = block.warpgroup
    jax_compat.store_registers(scratch.row_max.at[own], state.row_max)
    jax_compat.store_registers(scratch.row_sum.at[own], state.row_sum)
    plgpu.barrier_arrive(scratch.done)
    plgpu.barrier_wait(scratch.done)
    warpgroups = range(scratch.row_max.shape[0])
    maxima = [jax_compat.load_registers(scratch.row_max.at[i], COLUMNS) for i in warpgroups]
    sums = [jax_compat.load_registers(scratch.row_sum.at[i], COLUMNS) for i in warpgroups]
    row_max = functools.reduce(jnp.maximum, maxima)
    sink = None
    if sinks is not None:
        # A sequence's first split alone counts it.
        sink = load_numbers(block, sinks, problem)
        sink += jnp.where(block.split == 0, 0.0, -jnp.inf)
        row_max = jnp.maximum(row_max, sink)
    safe_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
    terms = [x * jnp.exp2(y - safe_max) for x, y in zip(sums, maxima, strict=True)]
    row_sum = functools.reduce(jnp.add, terms)
    if sink is not None:
        row_sum += jnp.exp2(sink - safe_max)
    weight = jnp.exp2(state.row_max - safe_max)
    if lax.axis_size("split") == 1:
        denominator = row_sum * (formats.PROBABILITY_SCALE * CODE_UNIT)
        weight *= jnp.where(row_sum > 0, 1.0 / jnp.where(row_sum > 0, denominator, 1.0), 0.0)
    return row_max, row_sum, weight


def _store(out, row_max, row_sum, block: Block, outputs: Outputs, problem: Problem) -> None:
    if lax.axis_size("split") == 1:
        (out_gmem,) = outputs
        _store_output(out, block.first_row, block.first_head, out_gmem.at[block.batch], problem.group)
        return
    out_gmem, row_max_gmem, row_sum_gmem = outputs
    where = (block.batch, block.kv_head, block.split)
    # A split's rows look like one token's heads.
    _store_output(out, block.first_row, jnp.int32(0), out_gmem.at[where], problem.rows)
    store = plgpu.inline_mgpu(arg_types=(COLUMNS, SCALAR, plgpu.RefType()))(registers.store_column_numbers)
    store(row_max, block.first_row, row_max_gmem.at[where])
    store(row_sum, block.first_row, row_sum_gmem.at[where])


def _store_output(out, first_row, first_head, target, group: int) -> None:
    types = (plgpu.Layout.WGMMA, SCALAR, SCALAR, plgpu.RefType())
    store = functools.partial(registers.store_output, group=group)
    plgpu.inline_mgpu(arg_types=types)(store)(out, first_row, first_head, target)
