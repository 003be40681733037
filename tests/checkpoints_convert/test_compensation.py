"""Compensation inside the converter: right moments, better blocks, resumable, compiled once."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import block_of, parameter_bytes, write_checkpoint

from checkpoints_convert import compensation
from checkpoints_convert.algorithms import gptq
from checkpoints_convert.algorithms.gptq import quantize_measured
from checkpoints_convert.calibrate import Calibrator
from checkpoints_convert.compensation import Compensator
from checkpoints_convert.conversion import ConversionOptions, convert, needs_calibration
from fireq_jax import LlamaForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints.folder import WORK_FOLDER
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.parameters import quantize_linear
from pallas_kernels.quantized_tensor import QuantizedTensor

FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = config_from_huggingface(FIELDS)
PLUS = recipes.fireq_plus()


def hidden_of() -> np.ndarray:
    """Correlated hidden states: a few directions carry most of the energy."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(16, 32, 64)) @ (rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64)))).astype(
        np.float32
    )


def without_smoothing(**changes: object) -> QuantizationConfig:
    return dataclasses.replace(PLUS, smoothing=None, **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", FIELDS, 0.1)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 64, (8, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def converted(source: Path, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "plus"
    convert(options(source, output), tokens, progress=False)
    return output


def options(model: Path, output: Path) -> ConversionOptions:
    return ConversionOptions(model, output, "fireq_plus", PLUS, dtype="float32", batch_size=4)


def block_error(quantization: QuantizationConfig) -> float:
    """Relative output error of a block quantized on ``hidden_of()``."""
    block, hidden = block_of(CONFIG), hidden_of()
    exact, _ = Calibrator(CONFIG, 8).run(block, 0, hidden)
    _, output = Compensator(CONFIG, quantization, 8).quantize(block, 0, hidden, hidden, jnp.float32)
    assert output is not None
    return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


@pytest.mark.slow
def test_a_compensated_block_is_closer_than_one_with_searched_scales() -> None:
    searched = block_error(without_smoothing(error_compensation=False))
    compensated = block_error(without_smoothing())
    assert 0 < compensated < 0.9 * searched


def test_moments_are_those_of_the_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        compensation,
        "quantize_measured",
        lambda weight, inputs, config: seen.append(inputs) or quantize_measured(weight, inputs, config),
    )
    block, hidden = block_of(CONFIG), hidden_of()
    config = without_smoothing(activation_format="none", kv_format="none", query_format="none")
    Compensator(CONFIG, config, 8).quantize(block, 0, hidden, hidden + 0.5, jnp.float32)

    def normalized(x: np.ndarray) -> np.ndarray:
        return (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)).reshape(-1, 64)

    exact, disturbed = normalized(hidden), normalized(hidden + 0.5)
    np.testing.assert_allclose(seen[0].hessian, disturbed.T @ disturbed / len(exact), atol=1e-4)
    np.testing.assert_allclose(seen[0].cross, exact.T @ disturbed / len(exact), atol=1e-4)
    assert [inputs.hessian.shape[0] for inputs in seen] == [64, 64, 64, 96]


def test_kept_layers_stay_float_and_the_others_do_not() -> None:
    config = without_smoothing(keep_float=("*.o_proj",))
    parameters, _ = Compensator(CONFIG, config, 8).quantize(block_of(CONFIG), 2, hidden_of(), hidden_of(), jnp.float32)
    quantized = {name for name, value in parameters.items() if isinstance(value, QuantizedTensor)}
    assert quantized == {
        f"layers.2.{linear}.weight" for linear in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    np.testing.assert_array_equal(
        parameters["layers.2.self_attn.o_proj.weight"], block_of(CONFIG)["self_attn.o_proj.weight"]
    )


def test_converted_model_runs_and_is_close(source: Path, tokens: np.ndarray, converted: Path) -> None:
    """On calibration text, where rounding to nearest is off by 0.42; other text says little of a random model."""
    exact = LlamaForCausalLM.from_pretrained(source, dtype=jnp.float32)(jnp.asarray(tokens))
    quantized = LlamaForCausalLM.from_pretrained(converted, dtype=jnp.float32)(jnp.asarray(tokens))
    assert 0 < jnp.linalg.norm(quantized - exact) / jnp.linalg.norm(exact) < 0.2
    assert not (converted / WORK_FOLDER).exists()


def test_interrupted_conversion_resumes_to_the_same_result(
    source: Path, tokens: np.ndarray, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = Compensator.quantize

    def fail_at_last_block(self: Compensator, block: dict, index: int, *rest: object):
        if index == 2:
            raise KeyboardInterrupt
        return quantize(self, block, index, *rest)

    monkeypatch.setattr(Compensator, "quantize", fail_at_last_block)
    with pytest.raises(KeyboardInterrupt):
        convert(options(source, tmp_path / "plus"), tokens, progress=False)
    monkeypatch.undo()
    convert(options(source, tmp_path / "plus"), tokens, resume=True, progress=False)
    assert parameter_bytes(tmp_path / "plus") == parameter_bytes(converted)


def test_steps_compile_once_for_all_blocks(source: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    compensation._moments_step.clear_cache()
    convert(options(source, tmp_path / "plus"), tokens, progress=False)
    assert compensation._moments_step._cache_size() == 4  # one for each linear layer of a block


def test_cost_counts_every_pass_that_is_made() -> None:
    """qkv [128, 64], o [64, 64], gate and up [192, 64], down [64, 96]: 8192, 4096, 12288 and 6144 weights."""
    before = 0 + 8192 + 12288 + 24576
    moments = 3 * 64**2 + 96**2
    rounding = gptq.rounding_operations(128 + 64 + 192, 64) + gptq.rounding_operations(64, 96)
    found = compensation.compensation_operations(CONFIG, PLUS, samples=5, length=2)
    assert found == 2 * 10 * (2 * before + 30720 + 2 * moments) + rounding
    alone = dataclasses.replace(PLUS, calibration_stream="float", error_compensation=False)
    assert compensation.compensation_operations(CONFIG, alone, samples=5, length=2) == 2 * 10 * (before + moments)


def test_it_says_when_text_is_missing(source: Path, tmp_path: Path) -> None:
    assert needs_calibration(without_smoothing())
    with pytest.raises(ValueError, match="give calibration text"):
        convert(options(source, tmp_path / "plus"), None, progress=False)
    with pytest.raises(ValueError, match="moments"):
        quantize_linear(jnp.ones((64, 128)), PLUS)
