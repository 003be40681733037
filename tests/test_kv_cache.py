"""The cache: one slot a token, whatever the padding; nothing written where nothing belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax import ModelConfig, QuantizationConfig
from fireq_jax.models import KVCache, kv_cache
from pallas_kernels import formats

CONFIG = ModelConfig(32, 64, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
append = jax.jit(kv_cache.append)


def rows(length, seed=0, kv_format="int4"):
    x = np.random.default_rng(seed).standard_normal((3, 2, length, 16))
    return formats.quantize_kv(jnp.asarray(x, jnp.float32), kv_format)


def leaves(tree):
    return [np.asarray(leaf).astype(np.float32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("kv_format", "group", "row_bytes"),
    [("int4", None, 8 + 2), ("int4", 8, 8 + 2 * 2), ("fp8", None, 16 + 4), ("none", None, 16 * 2)],
)
def test_bytes_of_an_empty_cache(kv_format, group, row_bytes):
    """INT4 rows take 4 bits a channel and a bf16 scale a group; FP8 rows 8 bits and a float32 scale."""
    quantization = QuantizationConfig(kv_format=kv_format, kv_group_size=group)
    cache = KVCache.create(CONFIG, quantization, batch=3, capacity=5)
    assert cache.capacity == 5
    assert len(cache.layers) == 2
    assert formats.nbytes(cache.layers) == 2 * 2 * (3 * 2 * 5) * row_bytes
    np.testing.assert_array_equal(cache.lengths, [0, 0, 0])
    # A pytree: a scan or a donated argument sees plain arrays.
    assert jax.tree.structure(jax.tree.map(lambda x: x, cache)) == jax.tree.structure(cache)


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity is 0"):
        KVCache.create(CONFIG, QuantizationConfig(), 1, 0)


@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_fill_keeps_the_rows_and_leaves_the_rest_empty(kv_format):
    new = rows(4, kv_format=kv_format)
    for stored, row in zip(leaves(kv_cache.fill(new, 6)), leaves(new), strict=True):
        np.testing.assert_array_equal(stored[:, :, :4], row)
        assert not stored[:, :, 4:].any()
    with pytest.raises(ValueError, match="prompt has 4 tokens; the cache holds 3"):
        kv_cache.fill(new, 3)


@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_append_writes_each_sequences_new_rows_and_nothing_else(kv_format):
    """Starts and counts differ; one sequence has nothing new, one runs out of slots."""
    old, new = rows(6, 1, kv_format), rows(3, 2, kv_format)
    start, lengths = np.int32([1, 2, 5]), np.int32([3, 0, 2])
    stored = append(old, new, start, lengths)
    for after, before, added in zip(leaves(stored), leaves(old), leaves(new), strict=True):
        expected = before.copy()
        expected[0, :, 1:4] = added[0, :, :3]
        expected[2, :, 5] = added[2, :, 0]  # its second row would be slot 6 of 6
        np.testing.assert_array_equal(after, expected)
