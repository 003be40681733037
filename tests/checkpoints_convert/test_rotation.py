"""Rotating the residual stream changes no model, and makes GPTQ lose less where channels stand out."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_blocks import block_of, kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import family_fields, family_tokens
from tiny_llama import write_folder

from checkpoints_convert.algorithms import rotation
from checkpoints_convert.algorithms.gptq import InputMoments, quantize_measured
from checkpoints_convert.calibrate import abstract_layer, run_layer
from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import AutoModelForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from fireq_jax.models.parameters import layer_parameters, with_parameters
from fireq_jax.quantization import SmoothingConfig

ONLY_ROTATED = dataclasses.replace(
    recipes.none(),
    smoothing=SmoothingConfig(
        residual_basis="hadamard", qkv_input=False, value_output=False, gate_up_input=False, up_down=False,
        pre_rope=False, post_rope_channels=0,
    ),
)  # fmt: skip
# Of each kind of tensors: biases, norms of heads, multipliers, gains of 1 + w, experts with and without biases.
CASES = "qwen2", "qwen3", "smollm3", "granite", "gemma", "phi3 longrope", "mixtral", "gpt_oss"
ROTATABLE = [(case, index) for case, index in kinds() if case in CASES]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400))
def test_rotations_are_orthogonal_and_spread_a_channel(width: int) -> None:
    matrix = rotation.residual_rotation(width).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-5)
    odd = width // (width & -width)
    assert np.abs(matrix).max() <= np.sqrt(odd / width) * 1.001


@pytest.mark.parametrize(("case", "index"), ROTATABLE, ids=str)
def test_a_rotated_block_does_the_same_to_a_rotated_stream(
    case: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Op by op: families share what is compiled.
    monkeypatch.setattr(rotation, "rotate_block", rotation.rotate_block.__wrapped__)
    config, block = block_of(case, index)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, config.hidden_size)), jnp.float32)
    matrix = jnp.asarray(rotation.residual_rotation(config.hidden_size))

    def run(block: dict[str, jax.Array], x: jax.Array) -> np.ndarray:
        parameters = layer_parameters(block, index, recipes.none(), jnp.float32)
        own = {name.removeprefix(f"layers.{index}."): value for name, value in parameters.items()}
        return np.asarray(run_layer(with_parameters(abstract_layer(config, recipes.none(), index), own), config, x))

    exact = run(block, hidden)
    rotated = rotation.rotate_block(block, config, matrix)
    assert all((np.asarray(array) == 1).all() for name, array in rotated.items() if name.endswith("layernorm.weight"))
    same = run(rotated, hidden @ matrix) @ np.asarray(matrix).T
    np.testing.assert_allclose(same, exact, rtol=0, atol=2e-5 * np.abs(exact - np.asarray(hidden)).max())


@pytest.mark.parametrize("case", ["llama", "granite", "gemma", "gpt_oss"])
def test_a_rotated_model_is_the_same_model(case: str, tmp_path: Path) -> None:
    """Multipliers, tied heads, gains of 1 + w, experts with biases."""
    source = write_folder(tmp_path / "source", family_fields(case, num_hidden_layers=2))
    convert(ConversionOptions(source, tmp_path / "out", "test", ONLY_ROTATED, "float32"), None, progress=False)
    exact, model = (AutoModelForCausalLM.from_pretrained(tmp_path / x, dtype=jnp.float32) for x in ("source", "out"))
    assert (model.head_basis is None) == (not exact.config.tie_word_embeddings)
    assert not np.allclose(model.embed_tokens.get_value(), exact.embed_tokens.get_value(), atol=1e-3)
    logits, expected = (np.asarray(each(family_tokens())) for each in (model, exact))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_tied_head_that_is_quantized_becomes_one_of_its_own(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", family_fields("gemma", num_hidden_layers=1))
    quantization = dataclasses.replace(ONLY_ROTATED, lm_head_format="fp8")
    convert(ConversionOptions(source, tmp_path / "out", "test", quantization, "float32"), None, progress=False)
    exact, model = (AutoModelForCausalLM.from_pretrained(tmp_path / x, dtype=jnp.float32) for x in ("source", "out"))
    assert model.head_basis is None
    logits, expected = (np.asarray(each(family_tokens())) for each in (model, exact))
    assert 0 < np.linalg.norm(logits - expected) < 0.06 * np.linalg.norm(expected)  # E4M3: 2^-4 of each number at most


@pytest.mark.parametrize("case", ["gemma2", "olmo2", "cohere"])
def test_families_that_cannot_be_rotated_are_left_as_they_are(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_folder(tmp_path / "source", family_fields(case, num_hidden_layers=1))
    with caplog.at_level("INFO"):
        report = convert(ConversionOptions(source, tmp_path / "out", "test", ONLY_ROTATED, "float32"), None)
    assert "the residual stream is not rotated" in caplog.text
    assert report["quantization"]["smoothing"]["residual_basis"] == "channels"
    stored = HuggingFaceCheckpoint(source).global_tensor("embed_tokens")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(model.embed_tokens.get_value()), stored)


def test_rotation_saves_gptq_from_channels_that_stand_out() -> None:
    random = np.random.default_rng(0)
    sizes = np.ones(128)
    sizes[[5, 70]] = 40.0
    x = random.normal(size=(512, 128)) * sizes
    weight = random.normal(size=(128, 128)) / np.sqrt(128)
    unseen = random.normal(size=(512, 128)) * sizes
    config = dataclasses.replace(recipes.fireq_plus(), calibration_stream="float")

    def loss(weight: np.ndarray, x: np.ndarray, unseen: np.ndarray) -> float:
        moments = InputMoments(jnp.asarray(x.T @ x / len(x), jnp.float32))
        rounded = np.asarray(quantize_measured(jnp.asarray(weight, jnp.float32), moments, config).dequantize())
        return float(np.linalg.norm(unseen @ (rounded - weight).T) / np.linalg.norm(unseen @ weight.T))

    matrix = rotation.residual_rotation(128)
    assert loss(weight @ matrix, x @ matrix, unseen @ matrix) < 0.8 * loss(weight, x, unseen)


def test_folders_written_without_the_option_are_read() -> None:
    fields = recipes.fireq().to_dict()
    del fields["smoothing"]["residual_basis"]
    assert QuantizationConfig.from_dict(fields) == recipes.fireq()
