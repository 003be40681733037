"""Recipes on the blocks of every family: smoothing changes no function, and converting works."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import CASES, family_fields
from tiny_llama import weights_of

from checkpoints_convert.algorithms import smoothing
from checkpoints_convert.algorithms.keys import KeyMoments, KeySample, KeyStatistics
from checkpoints_convert.calibrate import abstract_layer, run_layer
from fireq_jax import ModelConfig, recipes
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.block import Block
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import layer_parameters, with_parameters
from fireq_jax.quantization import SmoothingConfig

FITTED = recipes.fireq_plus().smoothing
assert FITTED is not None
# All that can be asked for at once: fitted pairs exclude S, a balanced basis of values excludes Lambda1.
SCALED = SmoothingConfig(
    post_rope_channels=3, pair_statistic="rms", query_exponent=0.25, key_offset=True, value_basis="hadamard",
    activation_exponent=0.25,
)  # fmt: skip
HIDDEN = np.random.default_rng(0).normal(size=(1, 40, 48)).astype(np.float32)


def kinds() -> list[tuple[str, int]]:
    """Case, and the first layer of each kind that its model has."""
    configs = {case: config_from_huggingface(family_fields(case)) for case in CASES}
    return [(case, index) for case, config in configs.items() for index in sorted({*map(config.first_like, range(4))})]


@functools.cache
def model_of(case: str):
    fields = family_fields(case)
    config = config_from_huggingface(fields)
    return config, tensor_table(fields, config), weights_of(fields)


def block_of(case: str, index: int) -> tuple[ModelConfig, Block]:
    config, table, tensors = model_of(case)
    prefix = table.prefix.format(index=index)
    block = {
        ours: source.read(*(tensors[prefix + name] for name in source.names)) for ours, source in table.block.items()
    }
    return config, {name: jnp.asarray(array, jnp.float32) for name, array in block.items()}


def statistics_of(config: ModelConfig) -> tuple[KeyStatistics, dict[str, jax.Array], jax.Array]:
    """Keys, inputs and values that no text gave: the function must stay whatever was measured.

    Nothing is seen of channels that pad a head.
    """
    random = np.random.default_rng(1)
    kv_heads, head_dim, half = config.num_kv_heads, config.head_dim, config.head_dim // 2
    real = np.tile(np.arange(half) < config.width // 2, 2)

    def sizes(*shape: int) -> np.ndarray:
        return np.exp(random.normal(size=shape)).astype(np.float32)

    def channels(*shape: int) -> jax.Array:
        return jnp.asarray(sizes(*shape, kv_heads, head_dim) * real)

    pairs = channels()[:, :half]
    moments = KeyMoments(channels() - channels(), channels() + 20 * real, channels())
    sample = KeySample(channels(7) * jnp.asarray(random.choice([-1, 1], (7, 1, head_dim))), channels(7)[..., :half])
    rows = sizes(kv_heads, head_dim, head_dim) * (np.arange(head_dim) < config.width)
    widths = {
        "qkv_input": config.hidden_size, "o_input": config.num_heads * head_dim,
        "gate_up_input": config.hidden_size, "down_input": config.intermediate_size,
    }  # fmt: skip
    inputs = {name: jnp.asarray(sizes(width)) for name, width in widths.items()}
    if config.experts is not None:
        inputs["down_input"] = jnp.asarray(sizes(config.experts.count, config.intermediate_size))
    return KeyStatistics(pairs, channels(), moments, sample), inputs, jnp.asarray(rows.swapaxes(1, 2) @ rows)


def layer_of(config: ModelConfig, block: Block, index: int) -> DecoderLayer:
    """A float layer that takes S and, in models that may have one, an offset."""
    quantization = dataclasses.replace(recipes.none(), smoothing=SCALED)
    shape = (config.num_kv_heads, config.head_dim)
    neutral = {"self_attn.post_rope_scale": jnp.ones(shape)}
    if config.ignores_offsets:
        neutral["self_attn.key_offset"] = jnp.zeros(shape)
    parameters = layer_parameters({**neutral, **block}, index, quantization, jnp.float32)
    own = {name.removeprefix(f"layers.{index}."): value for name, value in parameters.items()}
    return with_parameters(abstract_layer(config, quantization, index), own)


@pytest.mark.parametrize(("case", "index"), kinds(), ids=lambda x: str(x))
def test_smoothing_changes_no_familys_function(case: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Op by op: families share what is compiled.
    monkeypatch.setattr(smoothing, "_rescale", smoothing._rescale.__wrapped__)
    config, block = block_of(case, index)
    keys, inputs, values = statistics_of(config)
    exact = np.asarray(run_layer(layer_of(config, block, index), config, jnp.asarray(HIDDEN)))
    for wanted in (SCALED, FITTED):
        smoothed = smoothing.smooth_block(block, keys, config, wanted, inputs, values)
        assert not np.array_equal(smoothed["self_attn.v_proj.weight"], block["self_attn.v_proj.weight"])
        same = np.asarray(run_layer(layer_of(config, smoothed, index), config, jnp.asarray(HIDDEN)))
        np.testing.assert_allclose(same, exact, rtol=0, atol=1e-5 * np.abs(exact - HIDDEN).max())
