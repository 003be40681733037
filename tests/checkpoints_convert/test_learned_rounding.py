"""Learned rounding: it starts where rounding stopped, and what it keeps is better on text that it did not see."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import block_of, parameter_bytes, write_checkpoint

from checkpoints_convert.algorithms import learned_rounding, reconstruction
from checkpoints_convert.algorithms.gptq import InputMoments, quantize_measured
from checkpoints_convert.algorithms.reconstruction import reconstruct, relative_error
from checkpoints_convert.calibrate import Calibrator, abstract_layer, run_layer
from checkpoints_convert.compensation import Compensator, compensation_operations
from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import QuantizationConfig
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.block import fuse_block
from fireq_jax.models.parameters import quantize_linear, with_parameters
from fireq_jax.quantization import SmoothingConfig
from pallas_kernels.quantized_tensor import QuantizedTensor

# 160 inputs of down_proj: two groups, the second one padded.
FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = config_from_huggingface(FIELDS)
PLAIN = QuantizationConfig(learned_steps=60)


def hidden_of(seed: int, samples: int = 16) -> np.ndarray:
    """Hidden states in which a few directions carry most of the energy, the same for every seed."""
    mixing = np.random.default_rng(1)
    mixing = mixing.normal(size=(64, 64)) * np.exp(mixing.normal(size=64))
    return (np.random.default_rng(seed).normal(size=(samples, 32, 64)) @ mixing).astype(np.float32)


def rounded(config: QuantizationConfig = PLAIN) -> tuple[dict, dict[str, jax.Array]]:
    """A block's parameters with plainly rounded weights, and its float parameters."""
    fused = fuse_block(block_of(CONFIG))
    return {n: quantize_linear(w, config) if n.endswith("proj.weight") else w for n, w in fused.items()}, fused


def origins_of(start: dict, fused: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {n: learned_rounding.origin(t, fused[n]) for n, t in start.items() if isinstance(t, QuantizedTensor)}


def same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        dataclasses.replace(PLAIN, scale_dtype="bf16", group_size=64),
        dataclasses.replace(PLAIN, weight_format="nf4"),
        dataclasses.replace(PLAIN, scale_search=True, error_compensation=True),
    ],
)
def test_no_change_is_exactly_the_start(config: QuantizationConfig) -> None:
    """Also for codes that compensation moved away from the nearest, and padded groups."""
    weight = jax.random.normal(jax.random.key(0), (64, 160))
    inputs = jax.random.normal(jax.random.key(1), (512, 160)) @ jax.random.normal(jax.random.key(2), (160, 160))
    moments = InputMoments(inputs.T @ inputs)
    tensor = quantize_measured(weight, moments, config) if config.measures_inputs else quantize_linear(weight, config)
    start = {"a.weight": tensor, "norm.weight": jnp.linspace(0.5, 2, 160)}
    origins = {"a.weight": learned_rounding.origin(tensor, weight)}
    change = learned_rounding.no_change(start, origins)
    changed = learned_rounding.changed_parameters(change, start, origins)
    same(changed["a.weight"], tensor)
    floats = learned_rounding.float_parameters(change, start, origins)
    np.testing.assert_array_equal(floats["a.weight"], tensor.dequantize())
    np.testing.assert_array_equal(changed["norm.weight"], start["norm.weight"])
    # Weights that lie in the cell of their code say where in it.
    step = jnp.repeat(tensor.codes().group_scale.astype(jnp.float32), tensor.group_size, axis=1)[:, :160]
    inside = jnp.abs(origins["a.weight"][:, :160] - tensor.unscaled()) > 1e-3 * step
    assert jnp.mean(inside) > 0.3


def test_gradients_pass_through_rounding() -> None:
    gradient = jax.grad(lambda x: jnp.sum(3 * learned_rounding.straight_through(jnp.sign(x), x)))(jnp.ones(4))
    np.testing.assert_array_equal(gradient, jnp.full(4, 3.0))
    assert learned_rounding.straight_through(jnp.float32(0.3), jnp.float32(1e8)) == jnp.float32(0.3)


def test_stand_in_computes_what_the_quantized_block_does() -> None:
    """The block with rounded float weights is the quantized one but for the rounding of activations and cache."""
    start, fused = rounded()
    origins, x = origins_of(start, fused), jnp.asarray(hidden_of(2))
    config = dataclasses.replace(PLAIN, activation_format="none").with_kv_format("none")
    floats = learned_rounding.float_parameters(learned_rounding.no_change(start, origins), start, origins)
    quantized = output_of(config, start, x)
    assert relative_error(output_of(config.with_float_weights(), floats, x), quantized) < 1e-10


@functools.partial(jax.jit, static_argnums=0)
def output_of(config: QuantizationConfig, parameters: dict, hidden: jax.Array) -> jax.Array:
    return run_layer(with_parameters(abstract_layer(CONFIG, config, 0), parameters), CONFIG, hidden)


def learn(config: QuantizationConfig, samples: int = 16) -> tuple[dict, dict]:
    """The rounded block and what learning changes, for outputs of the float block."""
    start, fused = rounded(config)
    hidden = hidden_of(2, samples)
    target, _ = Calibrator(CONFIG, 8).run(block_of(CONFIG), 0, hidden)
    return start, reconstruct(CONFIG, config, start, fused, hidden, target, batch_size=8, index=0)


def test_unseen_text_gains_and_only_codes_scales_and_gains_change() -> None:
    start, learned = learn(PLAIN)
    unseen = hidden_of(3)
    target, _ = Calibrator(CONFIG, 8).run(block_of(CONFIG), 0, unseen)
    errors = [
        relative_error(output_of(PLAIN, parameters, jnp.asarray(unseen)), jnp.asarray(target))
        for parameters in (start, {**start, **learned})
    ]
    assert errors[1] < 0.9 * errors[0]
    assert learned.keys() == start.keys()
    for name, before in start.items():
        after = learned[name]
        if not isinstance(before, QuantizedTensor):
            assert after.dtype == jnp.float32
            continue
        assert (after.shape, after.format, after.nbytes) == (before.shape, before.format, before.nbytes)
        assert np.asarray(after.group_scale).tobytes() == np.asarray(before.group_scale).tobytes()
        changed = jnp.mean(after.codes().codes != before.codes().codes)
        assert 0 < changed < 0.5


def test_a_block_that_got_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rounding, "RATE", 10.0)
    _, learned = learn(dataclasses.replace(PLAIN, learned_steps=3))
    assert learned == {}


def test_kept_blocks_have_nothing_to_learn() -> None:
    fused = fuse_block(block_of(CONFIG))
    config = dataclasses.replace(PLAIN, keep_float=("*",))
    assert reconstruct(CONFIG, config, fused, fused, hidden_of(2), hidden_of(2), batch_size=8, index=0) == {}


def test_one_sequence_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2 calibration sequences, not 1"):
        learn(PLAIN, samples=1)


def test_converter_learns_each_block_with_one_compilation(tmp_path: Path) -> None:
    """Also with centred keys, kept layers and FP8 ones; and an interrupted run goes on to the same bytes."""
    model = write_checkpoint(tmp_path / "model", FIELDS, 0.1)
    tokens = np.random.default_rng(2).integers(0, 64, (8, 32), dtype=np.int32)
    config = dataclasses.replace(
        PLAIN,
        learned_steps=4,
        calibration_stream="quantized",
        smoothing=SmoothingConfig(post_rope_channels=0, key_offset=True),
        keep_float=("*.o_proj",),
        layer_formats={"*.down_proj": "fp8"},
    )
    options = ConversionOptions(model, tmp_path / "whole", "learned", config, dtype="float32", batch_size=4)
    reconstruction._learning_step.clear_cache()
    convert(options, tokens, progress=False)
    assert reconstruction._learning_step._cache_size() == 1
    resumed = dataclasses.replace(options, output=tmp_path / "resumed")
    quantize = Compensator.quantize

    def fail_at_last_block(self: Compensator, block: dict, index: int, *rest: object):
        if index == 1:
            raise KeyboardInterrupt
        return quantize(self, block, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compensator, "quantize", fail_at_last_block)
        with pytest.raises(KeyboardInterrupt):
            convert(resumed, tokens, progress=False)
    convert(resumed, tokens, resume=True, progress=False)
    assert parameter_bytes(resumed.output) == parameter_bytes(options.output)


def test_converter_asks_for_two_sequences_before_it_writes(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", FIELDS, 0.1)
    options = ConversionOptions(model, tmp_path / "out", "learned", PLAIN)
    with pytest.raises(ValueError, match="at least 2 calibration sequences, not 1"):
        convert(options, np.zeros((1, 32), np.int32), progress=False)
    assert not options.output.exists()


def test_cost_counts_learning() -> None:
    """qkv [128, 64], o [64, 64], gate and up [320, 64], down [64, 160]: 43008 weights; 2 of 16 sequences judge."""
    found = compensation_operations(CONFIG, PLAIN, samples=16, length=32)
    assert found == 2 * 43008 * 32 * (3 * 60 + 2 * 2 + 16)
