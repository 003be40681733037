"""Calibration statistics are those of the model's own forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.calibrate import Calibrator
from fireq_jax import ModelConfig
from fireq_jax.models.block import block_shapes
from fireq_jax.models.rope import rope_tables
from pallas_kernels.rope_quantize import apply_rope

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=48, intermediate_size=80, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    attention_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def block() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shapes = block_shapes(CONFIG)
    return {name: jnp.asarray(random.normal(0, 0.1, shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(6, 10, 48)).astype(np.float32)


def test_statistics_equal_a_direct_computation(block: dict[str, jax.Array], hidden: np.ndarray) -> None:
    _, statistics = Calibrator(CONFIG, batch_size=6).run(block, 0, hidden)
    x = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)
    x = x * np.asarray(block["input_layernorm.weight"])
    np.testing.assert_allclose(statistics.inputs["qkv_input"].absmax, np.abs(x).max((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(statistics.inputs["qkv_input"].mean_abs, np.abs(x).mean((0, 1)), rtol=1e-5)

    keys = x @ np.asarray(block["self_attn.k_proj.weight"]).T + np.asarray(block["self_attn.k_proj.bias"])
    keys = keys.reshape(6, 10, 2, 8)
    pairs = np.hypot(keys[..., :4], keys[..., 4:]).max((0, 1))
    np.testing.assert_allclose(statistics.keys.pair_max, pairs, rtol=1e-4)
    positions = jnp.broadcast_to(jnp.arange(10), (6, 10))
    rotated = apply_rope(jnp.asarray(keys), *rope_tables(CONFIG, CONFIG.rope, positions, jnp.full((6,), 10)))
    np.testing.assert_allclose(statistics.keys.channel_max, np.abs(rotated).max((0, 1)), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_does_not_change_outputs_or_statistics(
    block: dict[str, jax.Array], hidden: np.ndarray, batch_size: int
) -> None:
    expected = Calibrator(CONFIG, batch_size=6).run(block, 0, hidden)
    found = Calibrator(CONFIG, batch_size=batch_size).run(block, 0, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        Calibrator(CONFIG, batch_size=0)
