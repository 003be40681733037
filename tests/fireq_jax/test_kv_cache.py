"""The empty cache; what is written into it, tests/test_rope_quantize.py says."""

import jax
import numpy as np
import pytest

from fireq_jax import ModelConfig, QuantizationConfig
from fireq_jax.models import KVCache
from pallas_kernels import formats

CONFIG = ModelConfig(32, 64, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


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
