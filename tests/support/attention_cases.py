"""Attentions that the kernels' tests share: their shapes, random operands, and how near a kernel has to be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import attention_reference
from pallas_kernels.sm90.decode_attention.config import Config as DecodeConfig
from pallas_kernels.sm90.prefill_attention.config import Config as PrefillConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one attention; ``starts`` None is decoding: the queries are the last tokens."""

    length: int = 1
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    slots: int = 512
    lengths: tuple[int, ...] = (512, 100)
    starts: tuple[int, ...] | None = None
    causal: bool = True
    window: int | None = None
    page: int | None = None
    outliers: bool = False
    falling: float = 0.0  # nats by which scores fall from one key to the next
    softcap: float | None = None
    sinks: bool = False
    config: DecodeConfig | PrefillConfig | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def scale(self) -> float:
        # Outliers would leave one key all the weight.
        return self.head_dim**-0.5 * (0.02 if self.outliers else 1.0)

    @property
    def softmax(self) -> dict[str, Any]:
        """Options of the ops; there are none for a plain softmax. Sinks from almost nothing to all of the weight."""
        sinks = jnp.linspace(-3.0, 9.0, self.heads, dtype=jnp.float32)
        return ({"softcap": self.softcap} if self.softcap else {}) | ({"sinks": sinks} if self.sinks else {})


def cases(table: dict[str, Case]):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in table.items()])


def assert_near(out, query, key, value, start, lengths, case: Case):
    """Each sequence's error against float32 attention over the same cache is about the reference's or less."""
    options = {
        "query_start": start, "kv_lengths": lengths, "scale": case.scale, "causal": case.causal, "window": case.window,
        "out_dtype": jnp.float32, **case.softmax,
    }  # fmt: skip
    with jax.default_matmul_precision("highest"):
        exact = attention_reference(ScaledArray(formats.dequantize(query), None, "none"), key, value, **options)
        reference = attention_reference(query, key, value, **options)
    norm = functools.partial(np.linalg.norm, axis=-1)
    exact, reference, out = (np.asarray(x, np.float32).reshape(case.batch, -1) for x in (exact, reference, out))
    allowed = 1.25 * norm(reference - exact) + 3e-3 * norm(exact)
    assert (norm(out - exact) <= allowed).all(), (norm(out - exact), norm(reference - exact), norm(exact))


def operands(case: Case):
    """Fresh random operands; the slots that hold no token have NaN scales."""
    keys = jax.random.split(jax.random.key(hash(case) % 2**31), 4)
    kv_shape = (case.batch, case.kv_heads, case.slots, case.head_dim)
    q = rows(keys[0], (case.batch, case.length, case.heads, case.head_dim), case.outliers)
    k, v = (rows(key, kv_shape, case.outliers) for key in keys[1:3])
    if case.falling:
        q += 4
        k -= case.falling / (4 * case.head_dim * case.scale) * jnp.arange(case.slots)[:, None]
    lengths = jnp.asarray(case.lengths, jnp.int32)
    start = jnp.maximum(lengths - case.length, 0) if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    empty = (jnp.arange(case.slots) >= lengths[:, None])[:, None, :, None]
    cache = [formats.quantize_kv(x, "int4") for x in (k, v)]
    cache = [dataclasses.replace(x, scale=jnp.where(empty, jnp.nan, x.scale)) for x in cache]
    return formats.quantize_fp8(q), *cache, start, lengths


def rows(key: jax.Array, shape: tuple[int, ...], outliers: bool) -> jax.Array:
    """Gaussian; with outliers a few channels are 20 times as large and tokens differ by powers of e."""
    x = jax.random.normal(key, shape)
    if outliers:
        channels, tokens = jax.random.split(jax.random.fold_in(key, 1))
        x *= 1 + 19 * jax.random.bernoulli(channels, 0.03, shape[-1:])
        x *= jnp.exp(jax.random.normal(tokens, (*shape[:-1], 1)))
    return x


def pages(key: ScaledArray, value: ScaledArray, size: int):
    """The cache in shuffled pages, and the page table."""
    batch, kv_heads, slots = key.values.shape[:3]
    count = batch * slots // size
    order = np.random.default_rng(0).permutation(count)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, kv_heads, slots // size, size, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(count, kv_heads, size, x.shape[-1])[order]

    table = jnp.asarray(np.argsort(order).reshape(batch, slots // size), jnp.int32)
    return jax.tree.map(split, key), jax.tree.map(split, value), table
