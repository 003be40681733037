"""Each rescaling leaves the float model's function alone and repairs what it is for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import config_of, tokens_of, weights_of

from checkpoints_convert.algorithms.keys import (
    KeyStatistics,
    PairTransform,
    fold_pairs,
    key_transform,
    post_rope_scale,
    pre_rope_scale,
)
from checkpoints_convert.algorithms.smoothing import (
    EXPONENTS,
    balance_norm,
    column_scale,
    searched_column_scale,
    smooth_block,
)
from fireq_jax import LlamaForCausalLM, QuantizationConfig
from fireq_jax.models import parameters
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.quantization import SmoothingConfig
from pallas_kernels import formats

FIELDS = config_of("gqa", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
CONFIG = config_from_huggingface(FIELDS)
NOTHING = SmoothingConfig(
    qkv_input=False, value_output=False, gate_up_input=False, up_down=False, pre_rope=False, post_rope_channels=0
)
INPUTS = {"qkv_input": CONFIG.hidden_size, "o_input": CONFIG.num_heads * CONFIG.head_dim}
INPUTS |= {"gate_up_input": CONFIG.hidden_size, "down_input": CONFIG.intermediate_size}
ONE_AT_A_TIME = {
    name: dataclasses.replace(NOTHING, **change)
    for name, change in {
        "qkv_input": {"qkv_input": True},
        "value_output": {"value_output": True},
        "gate_up_input": {"gate_up_input": True},
        "up_down": {"up_down": True},
        "pre_rope": {"pre_rope": True},
        "post_rope": {"post_rope_channels": 3},
        "all, max": {**dataclasses.asdict(SmoothingConfig()), "column_statistic": "max"},
        "all, mean": dataclasses.asdict(SmoothingConfig()),
    }.items()
}


def block_of():
    """A layer's weights with outliers in rows and columns, so that every rescaling has something to do."""
    rng = np.random.default_rng(0)
    prefix = "model.layers.0."
    block = {name.removeprefix(prefix): x for name, x in weights_of(FIELDS).items() if name.startswith(prefix)}
    return {name: jnp.asarray(x * np.exp(rng.standard_normal(x.shape[-1:]))) for name, x in block.items()}


def key_statistics(seed=0):
    rng = np.random.default_rng(seed)
    return KeyStatistics(
        pair_max=jnp.asarray(np.exp(rng.standard_normal((2, 6))), jnp.float32),
        channel_max=jnp.asarray(np.exp(rng.standard_normal((2, 12))), jnp.float32),
    )


forward = nnx.jit(lambda model, tokens: model(tokens))


def logits_of(block):
    """Float logits of a model with this layer; the layer decides whether it has a post-RoPE scale."""
    smoothing = SmoothingConfig() if "self_attn.post_rope_scale" in block else None
    quantization = QuantizationConfig(
        weight_format="none", activation_format="none", kv_format="none", query_format="none", smoothing=smoothing
    )
    tensors = weights_of(FIELDS)
    rest = {"embed_tokens": "model.embed_tokens", "norm.weight": "model.norm", "lm_head": "lm_head"}
    filled = parameters.layer_parameters(block, 0, quantization, jnp.float32)
    filled |= parameters.global_parameters(
        {ours: tensors[f"{theirs}.weight"] for ours, theirs in rest.items()}, quantization, jnp.float32
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, quantization, dtype=jnp.float32))
    return np.asarray(forward(parameters.with_parameters(model, filled), tokens_of(FIELDS)))


@pytest.fixture(scope="module")
def exact():
    return logits_of(block_of())


# --- the function stays -------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME)
def test_the_float_models_function_is_unchanged(smoothing, exact):
    """With biases and grouped queries; float32 rounding only (factors of e^3 both ways)."""
    block = block_of()
    smoothed = smooth_block(block, key_statistics(), CONFIG, smoothing)
    changed = [name for name in block if not np.array_equal(smoothed[name], block[name])]
    assert changed or "self_attn.post_rope_scale" in smoothed
    np.testing.assert_allclose(logits_of(smoothed), exact, rtol=0, atol=5e-5 * np.abs(exact).max())


def test_input_is_left_alone_and_nothing_asked_is_nothing_done():
    block = block_of()
    before = {name: np.asarray(x) for name, x in block.items()}
    smooth_block(block, key_statistics(), CONFIG, SmoothingConfig())
    after = smooth_block(block, None, CONFIG, NOTHING)
    assert after.keys() == before.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(block[name], x)
        np.testing.assert_array_equal(after[name], x)


def test_rope_scaling_needs_statistics():
    with pytest.raises(ValueError, match="calibrate"):
        smooth_block(block_of(), None, CONFIG, SmoothingConfig())


# --- columns -------------------------------------------------------------------------------------------


def imbalance(weight, statistic):
    columns = np.abs(np.asarray(weight))
    columns = columns.mean(axis=0) if statistic == "mean" else columns.max(axis=0)
    return columns.max() / columns.min()


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_column_imbalance_disappears(statistic):
    """From over 30 to exactly balanced where one weight decides the factor; their overall size stays."""
    block = block_of()
    smoothing = dataclasses.replace(SmoothingConfig(), column_statistic=statistic)
    smoothed = smooth_block(block, key_statistics(), CONFIG, smoothing)
    name = "mlp.down_proj.weight"
    assert imbalance(block[name], statistic) > 30
    assert imbalance(smoothed[name], statistic) == pytest.approx(1, rel=1e-4)
    scale = np.asarray(column_scale(block[name], statistic))
    assert np.log(scale).mean() == pytest.approx(0, abs=1e-5)
    # The two norms' linears share one factor a column, o_proj's heads one a kv-head channel.
    for names in (["mlp.gate_proj.weight", "mlp.up_proj.weight"], ["self_attn.o_proj.weight"]):
        before, after = (
            imbalance(np.concatenate([b[n] for n in names]).reshape(-1, 4 * 12), statistic) for b in (block, smoothed)
        )
        assert after < before


@pytest.mark.parametrize("name", ["qkv_input", "value_output", "gate_up_input", "up_down"])
def test_searched_columns_change_nothing_but_the_rounding(name, exact):
    inputs = {kind: 1 + jnp.arange(size) % 7 for kind, size in INPUTS.items()}
    smoothing = dataclasses.replace(NOTHING, **{name: True}, search_columns=True)
    smoothed = smooth_block(block_of(), None, CONFIG, smoothing, inputs)
    np.testing.assert_allclose(logits_of(smoothed), exact, rtol=0, atol=5e-5 * np.abs(exact).max())


def test_searched_columns_are_the_best_of_all_that_are_tried():
    """Under the inputs' magnitudes no exponent, and no balance, rounds to a smaller error."""
    rng = np.random.default_rng(4)
    weight = jnp.asarray(rng.standard_normal((48, 200)) * np.exp(rng.standard_normal(200)), jnp.float32)
    inputs = jnp.asarray(np.exp(2 * rng.standard_normal(200)), jnp.float32)

    def error(scale):
        padded = jnp.pad(weight * scale, ((0, 0), (0, 56)))
        rounded = formats.dequantize_weight(formats.quantize_weight(padded))[:, :200]
        return float(jnp.linalg.norm((rounded / scale - weight) * inputs))

    found = error(searched_column_scale(weight, "mean", inputs))
    others = [error(column_scale(weight, "mean", inputs, exponent)) for exponent in EXPONENTS]
    assert found == pytest.approx(min(*others, error(jnp.ones(200))), rel=1e-5)
    assert found < 0.8 * error(jnp.ones(200))


def test_all_zero_columns_get_no_factor():
    weight = jnp.asarray([[1.0, 0.0, 4.0], [1.0, 0.0, 4.0]])
    np.testing.assert_allclose(column_scale(weight, "mean"), [2.0, 1.0, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(column_scale(jnp.zeros((2, 3)), "max"), [1, 1, 1])


def relative_error(weight):
    """Of INT4 with FP8 group scales, in the function's own measure: the columns weighed by their inputs."""
    codes = formats.quantize_weight(
        jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % 128))), channel_scale="per_tensor_pow2"
    )
    return np.asarray(formats.dequantize_weight(codes))[:, : weight.shape[1]] - np.asarray(weight)


def test_balancing_repairs_columns_that_one_large_one_erases():
    """A column 100 times the others takes all seven steps; its input is 100 times smaller.

    Error of the layer's output over Gaussian inputs, before and after: balanced columns bring it
    to the level of an INT4 weight without outliers, about a tenth.
    """
    rng = np.random.default_rng(1)
    factor = np.where(np.arange(128) % 32 == 5, 100.0, 1.0)
    norm = jnp.asarray(1 / factor, jnp.float32)
    weight = jnp.asarray(0.02 * rng.standard_normal((64, 128)) * factor, jnp.float32)
    block = {"norm": norm, "linear.weight": weight}
    balanced = balance_norm(block, "norm", ("linear",), "mean")
    x = rng.standard_normal((256, 128))

    def output_error(b):
        exact = (x * np.asarray(b["norm"])) @ np.asarray(b["linear.weight"]).T
        error = (x * np.asarray(b["norm"])) @ relative_error(b["linear.weight"]).T
        return np.linalg.norm(error) / np.linalg.norm(exact)

    assert output_error(block) > 0.5
    assert output_error(balanced) < 0.15


def test_scale_underflow_is_what_the_channel_scale_is_for():
    """Group scales absmax / 7 of about 1e-3 lie below E4M3's normals; under the power of two they do not."""
    weight = jnp.asarray(0.003 * np.random.default_rng(2).standard_normal((32, 256)), jnp.float32)
    plain = np.abs(np.asarray(weight)).reshape(32, 2, 128).max(axis=-1) / 7
    assert np.all(plain < formats.E4M3_MIN_SUBNORMAL)  # they would all round to the same smallest number
    scales = np.asarray(formats.quantize_weight(weight, channel_scale="per_tensor_pow2").group_scale, np.float32)
    assert np.all(scales >= 2.0**-6)
    assert len(np.unique(scales)) > 2


# --- keys -----------------------------------------------------------------------------------------------


def kv_error(keys):
    """Relative INT4 error of key rows [tokens, H]."""
    stored = formats.quantize_kv(jnp.asarray(keys, jnp.float32), "int4")
    return np.linalg.norm(np.asarray(formats.dequantize(stored)) - keys, axis=0)


def test_pre_rope_scale_equalises_pairs():
    """Norms of all pairs but the excluded end at alpha; a pair that is always 0 keeps 1."""
    pair_max = jnp.asarray([[2.0, 8.0, 0.0, 100.0]])
    scale = pre_rope_scale(pair_max, jnp.asarray([[False, False, False, True]]), 8.0)
    np.testing.assert_allclose(scale, [[4.0, 1.0, 1.0, 1.0]])


def test_folded_pre_rope_scale_moves_keys_one_way_and_their_queries_the_other():
    """Heads 0, 1 read kv head 0 and heads 2, 3 kv head 1; both members of a pair get one factor; biases too."""
    block, scale = block_of(), jnp.asarray(np.arange(1.0, 13).reshape(2, 6))
    folded = fold_pairs(block, PairTransform(scale), CONFIG)
    for kind in ("weight", "bias"):
        for head in range(4):
            rows = slice(12 * head, 12 * head + 12)
            factor = np.tile(np.asarray(scale[head // 2]), 2)
            ratio = np.asarray(block[f"self_attn.q_proj.{kind}"][rows] / folded[f"self_attn.q_proj.{kind}"][rows])
            np.testing.assert_allclose(
                ratio.reshape(12, -1), np.broadcast_to(factor[:, None], ratio.reshape(12, -1).shape), rtol=1e-6
            )
        keys = np.asarray(folded[f"self_attn.k_proj.{kind}"] / block[f"self_attn.k_proj.{kind}"]).reshape(24, -1)
        np.testing.assert_allclose(keys, np.broadcast_to(np.tile(scale, (1, 2)).reshape(24, 1), keys.shape), rtol=1e-6)


def test_post_rope_scale_picks_outliers_and_their_partners():
    """Channel 5 of 8 (pair 1: channels 1 and 5) and channel 0 (pair 0) are the two largest."""
    channel_max = jnp.asarray([[40.0, 1.0, 2.0, 3.0, 5.0, 80.0, 1.0, 2.0], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 9.0, 8.0]])
    scale, pairs = post_rope_scale(channel_max, 2, 8.0)
    np.testing.assert_array_equal(pairs, [[True, True, False, False], [False, False, True, True]])
    expected = [[0.2, 8.0, 1, 1, 1.6, 0.1, 1, 1], [1, 1, 8, 1, 1, 1, 8 / 9, 1]]  # an all-zero channel keeps 1
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"post_rope_channels is 9.*8"):
        key_transform(KeyStatistics(channel_max[:, :4], channel_max), SmoothingConfig(post_rope_channels=9))
    none, no_pairs = post_rope_scale(channel_max, 0, 8.0)
    assert np.all(none == 1)
    assert not no_pairs.any()


def test_key_outliers_no_longer_cost_the_other_channels():
    """Rotated keys with two channels 50 times the rest: S brings the INT4 error of the rest down tenfold."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((400, 16))
    keys[:, [3, 12]] *= 50
    channel_max = jnp.asarray(np.abs(keys).max(axis=0)[None], jnp.float32)
    scale = np.asarray(post_rope_scale(channel_max, 2, 3.0)[0])[0]
    rest = np.setdiff1d(np.arange(16), [3, 12])
    before = (kv_error(keys) / np.linalg.norm(keys, axis=0))[rest].mean()
    after = (kv_error(keys * scale) / np.linalg.norm(keys * scale, axis=0))[rest].mean()
    assert before > 0.8  # nearly everything is rounded to 0
    assert after < 0.2
