"""The attention kernels in Pallas' GPU interpreter, which simulates threads, barriers and TMA and finds races.

It runs neither inlined register code nor products with an operand in registers. These have plain stand-ins here, on
logical arrays: what threads hold, and in which order, is ``test_attention_registers_sm90``'s matter.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import formats, jax_compat
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.decode_attention import launch as decode
from pallas_kernels.sm90.decode_attention import mainloop as decode_mainloop
from pallas_kernels.sm90.prefill_attention.config import SUM_STEP
from pallas_kernels.sm90.prefill_attention.prepare import PREPARED_TOKENS
from pallas_kernels.sm90.prefill_attention.registers import permute_tokens

needs_interpreter = pytest.mark.skipif(
    jax_compat.JAX_VERSION < (0, 12) or jax.default_backend() != "cpu" or int(os.environ.get("NPROC", "1")) < 4,
    reason="needs JAX 0.12 and a CPU, with a thread of XLA's for each warpgroup (NPROC=8)",
)


@contextlib.contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that are traced here run in the interpreter; it raises an error that says "RACE DETECTED"."""
    arrive, commit = plgpu.barrier_arrive, plgpu.commit_smem

    def arrive_after_reads(barrier: Any) -> None:
        # To the interpreter only a fence between proxies orders reads before a copy's writes to the same place. On GPUs
        # products read by the copies' own proxy, and threads tell whoever copies that they have read by arriving.
        commit()
        arrive(barrier)

    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "inline_mgpu", _inline_mgpu)
        patch.setattr(plgpu, "barrier_arrive", arrive_after_reads)
        patch.setattr(plgpu, "wgmma", _wgmma)
        patch.setattr(plgpu, "WGMMAAccumulatorRef", _Accumulator)
        patch.setattr(pl, "run_scoped", _run_scoped(pl.run_scoped))
        patch.setattr(decode_mainloop, "reduce_rows", _reduce_rows)
        patch.setattr(decode, "combine_splits", _combine_splits)
        parameters = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
        try:
            with plgpu.force_gpu_interpret_mode(parameters):
                yield
        finally:
            gpu_callbacks.reset_gpu_interpret_mode_state()


def _inline_mgpu(**_: Any) -> Callable[..., Callable[..., Any]]:
    """``plgpu.inline_mgpu``: the function's stand-in, called with references and arrays."""

    def decorate(function: Any) -> Callable[..., Any]:
        options: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            function, options = function.func, {**function.keywords, **options}
        return functools.partial(_STAND_INS[function.__name__], **options)

    return decorate


# --- products -------------------------------------------------------------------------------------

# Operands in shared memory of products in flight, by the product's identity, with that so that it keeps it.
_in_flight: dict[int, tuple[Any, list[Any]]] = {}


def _start_product(a: Any, b: Any, initial: Any, *, in_flight: bool = False) -> Any:
    product = initial + a[...].astype(jnp.float32) @ b[...].astype(jnp.float32).T
    earlier = _in_flight.pop(id(initial))[1] if in_flight else []
    _in_flight[id(product)] = product, [*earlier, *(x for x in (a, b) if not isinstance(x, jax.Array))]
    return product


def _finish_product(product: Any, *, later: int) -> Any:
    """Operands are read again: until here they must not change."""
    del later
    for operand in _in_flight.pop(id(product))[1]:
        product += 0 * jnp.sum(operand[...].astype(jnp.float32))
    return product


class _Accumulator:
    """``plgpu.WGMMAAccumulatorRef``."""

    def __init__(self, shape: tuple[int, ...]):
        self.value = jnp.zeros(shape, jnp.float32)

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value


def _wgmma(accumulator: _Accumulator, a: jax.Array, b: Any) -> None:
    accumulator.value += a.astype(jnp.float32) @ b[...].astype(jnp.float32)


def _run_scoped(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_scoped(function: Callable[..., Any], *types: Any, **kwargs: Any) -> Any:
        if types and isinstance(types[0], _Accumulator):
            return function(*types)
        return original(function, *types, **kwargs)

    return run_scoped


# --- prefill --------------------------------------------------------------------------------------


def _in_order(x: jax.Array) -> jax.Array:
    """``permute_tokens`` undone."""
    tokens = x.shape[-1]
    return x.reshape(*x.shape[:-1], tokens // 16, 4, 2, 2).swapaxes(-3, -2).reshape(x.shape)


def _load_rows(first: Any, head: Any, scales: Any) -> jax.Array:
    scales = scales[...]
    return scales[jnp.minimum(first + jnp.arange(64), len(scales) - 1)][:, head]


def prepared(key: formats.ScaledArray, value: formats.ScaledArray, kv_lengths: jax.Array, *, sum_columns: int) -> Any:
    """``prepare.prepare``."""
    slots = key.values.shape[2]
    padding = (0, 0), (0, 0), (0, -slots % PREPARED_TOKENS)
    valid = (jnp.arange(slots + padding[2][1]) < kv_lengths[:, None])[:, None]
    codes, scales = [], []
    for rows in (key, value):
        assert rows.scale is not None
        codes.append(jnp.pad(formats.unpack_int4(rows.values), (*padding, (0, 0))) * CODE_UNIT)
        scales.append(jnp.where(valid, jnp.pad(rows.scale[..., 0].astype(jnp.float32), padding), 1.0))
    v, last = codes[1].swapaxes(2, 3), 1 / scales[1]
    if sum_columns:
        pieces, last = _pieces(last, sum_columns)
        v = jnp.concatenate([v, pieces], axis=2)
    columns = jnp.stack([permute_tokens(x) for x in (scales[0], jnp.log2(scales[1]), last)], axis=2)
    return codes[0].astype(formats.E4M3), permute_tokens(v).astype(formats.E4M3), columns


def _pieces(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """x [B, kv_heads, S'] as E4M3 numbers [B, kv_heads, count, S'] in ever finer units, and the first unit."""
    blocks = x.reshape(*x.shape[:2], -1, PREPARED_TOKENS)
    unit = jnp.exp2(jnp.floor(jnp.log2(jnp.max(blocks, axis=-1, keepdims=True))) - 7)
    unit = jnp.broadcast_to(unit, blocks.shape).reshape(x.shape)
    rest, pieces = x / unit, []
    for _ in range(count):
        mantissa, exponent = jnp.frexp(rest)
        pieces.append(jnp.where(rest > 2.0**-6, jnp.ldexp(jnp.floor(mantissa * 16) / 16, exponent), 0.0))
        rest = (rest - pieces[-1]) * SUM_STEP
    return jnp.stack(pieces, axis=2), unit


# --- decode ---------------------------------------------------------------------------------------


def _rows_of(first_row: Any, first_head: Any, x: Any, *, rows: int, group: int) -> jax.Array:
    """Rows (token, head of a group) of [T, heads, ...]; past the end the last."""
    length = x.shape[0]
    row = jnp.minimum(first_row + jnp.arange(rows), length * group - 1)
    return x[...][row // group, first_head + row % group]


def _load_queries(first_row: Any, first_head: Any, queries: Any, *, rows: int, group: int) -> jax.Array:
    words = _rows_of(first_row, first_head, queries, rows=rows, group=group).reshape(-1, 4)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _store_queries(first_row: Any, words: Any, q_smem: Any, *, valid_rows: int, head_dim: int) -> None:
    rows = jax.lax.bitcast_convert_type(words, formats.E4M3).reshape(-1, head_dim)
    valid = first_row + jnp.arange(len(rows)) < valid_rows
    q_smem[...] = jnp.where(valid[:, None], rows.astype(jnp.float32), 0.0).astype(formats.E4M3)


def _load_codes(packed: Any, *, head_dim: int) -> jax.Array:
    codes = formats.unpack_int4(packed[...].reshape(-1, head_dim // 2))
    return (codes * CODE_UNIT).astype(formats.E4M3)


def _store_probabilities(p: jax.Array, p_smem: Any) -> None:
    p_smem[...] = p.astype(formats.E4M3).T


def _store_output(output: jax.Array, first_row: Any, first_head: Any, target: Any, *, group: int) -> None:
    for n in range(output.shape[1]):
        row = first_row + n

        @pl.when(row < target.shape[0] * group)
        def _store(n: int = n, row: Any = row) -> None:
            target[row // group, first_head + row % group] = output[:, n].astype(target.dtype)


def _store_column_numbers(numbers: jax.Array, first_row: Any, target: Any) -> None:
    for n in range(numbers.shape[0]):

        @pl.when(first_row + n < target.shape[0])
        def _store(n: int = n) -> None:
            target[first_row + n] = numbers[n]


def _reduce_rows(operation: str, x: jax.Array, scratch: Any) -> jax.Array:
    reduced = jnp.max(x, axis=0) if operation == "max" else jnp.sum(x, axis=0)
    # As the warps do, through shared memory that no other warpgroup may use.
    scratch[pl.ds(0, x.shape[1])] = reduced
    return scratch[pl.ds(0, x.shape[1])]


def _combine_splits(
    partial: jax.Array, row_max: jax.Array, row_sum: jax.Array, *, out_type: jax.ShapeDtypeStruct
) -> Any:
    """``combine.combine_splits``, a kernel of inlined code alone."""
    weight = jnp.exp2(row_max - jnp.maximum(jnp.max(row_max, axis=2, keepdims=True), -1e30))
    row_sum = jnp.sum(weight * row_sum, axis=2)[..., None] * (formats.PROBABILITY_SCALE * CODE_UNIT)
    out = jnp.sum(weight[..., None] * partial[:, :, :, 0], axis=2) / jnp.where(row_sum == 0, 1.0, row_sum)
    batch, length, heads, head_dim = out_type.shape
    out = out.reshape(batch, out.shape[1], length, -1, head_dim).swapaxes(1, 2)
    return out.reshape(batch, length, heads, head_dim).astype(out_type.dtype)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "zeros": lambda *, shape: jnp.zeros(shape, jnp.float32),
    "start_product": _start_product,
    "finish_product": _finish_product,
    "split_columns": lambda x, *, column: (x[:, :column], x[:, column:]),
    "probabilities_to_operand": lambda p: permute_tokens(p).astype(formats.E4M3),
    "load_columns": lambda numbers: _in_order(numbers[...]),
    "load_rows": _load_rows,
    "load_queries": _load_queries,
    "load_row_numbers": _rows_of,
    "store_queries": _store_queries,
    "load_keys": _load_codes,
    "load_values": lambda packed, *, head_dim: _load_codes(packed, head_dim=head_dim).T,
    "store_probabilities": _store_probabilities,
    "store_output": _store_output,
    "store_column_numbers": _store_column_numbers,
}
