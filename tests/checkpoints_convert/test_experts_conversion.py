"""Mixtures of experts in the converter: statistics by routing, weights one by one."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import block_of, write_checkpoint

from checkpoints_convert import compensation
from checkpoints_convert.algorithms import learned_rounding
from checkpoints_convert.algorithms.gptq import InputMoments, quantize_measured
from checkpoints_convert.calibrate import Calibrator
from checkpoints_convert.compensation import Compensator
from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import AutoModelForCausalLM, ModelConfig, QuantizationConfig, recipes
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import ExpertsConfig
from fireq_jax.models.parameters import parameters_of, quantize_linear
from fireq_jax.quantization import SmoothingConfig
from pallas_kernels.quantized_tensor import QuantizedTensor

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=48, intermediate_size=40, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    experts=ExpertsConfig(4, 2),
)  # fmt: skip
FIELDS = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def hidden_of() -> np.ndarray:
    """Correlated hidden states: a few directions carry most of the energy."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(8, 16, 48)) @ (rng.normal(size=(48, 48)) * np.exp(rng.normal(size=48)))).astype(np.float32)


def single(stack: QuantizedTensor, index: int) -> QuantizedTensor:
    return jax.tree.map(lambda array: array[index], stack)


def test_moments_are_of_an_experts_own_tokens() -> None:
    random = np.random.default_rng(3)
    x, y = (random.normal(size=(7, 5)).astype(np.float32) for _ in range(2))
    weights = np.array([[0.5, 0, 0, 0.25, 0, 0, 1], [0] * 7], np.float32)
    found = compensation._second_moment(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights))
    own = [0, 3, 6]
    np.testing.assert_allclose(found[0], (x[own] * weights[0, own, None] ** 2).T @ y[own] / 7, rtol=1e-3, atol=1e-5)
    # For one that has none, those of all.
    np.testing.assert_allclose(found[1] / compensation.UNROUTED, x.T @ y / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_stacks_are_rounded_one_by_one() -> None:
    config = QuantizationConfig(scale_search=True)
    random = np.random.default_rng(4)
    weights = jnp.asarray(random.normal(size=(2, 16, 40)), jnp.float32)
    rows = jnp.asarray(random.normal(size=(2, 64, 40)), jnp.float32)
    hessians = jnp.einsum("etk,etl->ekl", rows, rows)
    stack = quantize_measured(weights, InputMoments(hessians), config)
    plain = quantize_linear(weights, recipes.rtn())
    moved = {"w": 0.3 * jnp.asarray(random.normal(size=(2, 16, 128)), jnp.float32)}

    def learned(tensor: QuantizedTensor, weight: jax.Array, latent: jax.Array) -> QuantizedTensor:
        origins = {"w": learned_rounding.origin(tensor, weight)}
        change = learned_rounding.no_change({"w": tensor}, origins)._replace(latent={"w": latent})
        (result,) = learned_rounding.changed_parameters(change, {"w": tensor}, origins).values()
        assert isinstance(result, QuantizedTensor)
        exact = learned_rounding.float_parameters(change, {"w": tensor}, origins)["w"]
        np.testing.assert_allclose(exact, result.dequantize(), rtol=1e-6)
        return result

    whole = learned(plain, weights, moved["w"])
    for i in range(2):
        alone = quantize_measured(weights[i], InputMoments(hessians[i]), config)
        jax.tree.map(np.testing.assert_array_equal, single(plain, i), quantize_linear(weights[i], recipes.rtn()))
        np.testing.assert_allclose(single(stack, i).dequantize(), alone.dequantize(), rtol=1e-5)
        np.testing.assert_array_equal(
            single(whole, i).values, learned(single(plain, i), weights[i], moved["w"][i]).values
        )


@pytest.mark.slow
def test_compensated_experts_are_closer_than_rounded_ones() -> None:
    block, hidden = block_of(CONFIG), hidden_of()
    exact, _ = Calibrator(CONFIG, 8).run(block, 0, hidden)
    config = dataclasses.replace(CONFIG, num_layers=2)

    def error(**options: bool) -> float:
        kept = ("*.self_attn.*", "*.gate_up_proj")
        quantization = QuantizationConfig(
            rounding="table", calibration_stream="quantized", kv_format="none", query_format="none", keep_float=kept,
            scale_search=True, **options,
        )  # fmt: skip
        _, output = Compensator(config, quantization, 8).quantize(block, 0, hidden, hidden, jnp.float32)
        assert output is not None
        return float(np.linalg.norm(output - exact))

    assert error(error_compensation=True) < 0.8 * error(error_compensation=False)


@pytest.mark.slow
def test_a_converted_model_is_close_to_its_source(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", FIELDS, 0.1)
    tokens = np.random.default_rng(1).integers(0, 64, (4, 24), dtype=np.int32)
    # By statistics of each expert's own inputs, among others.
    smoothing = SmoothingConfig(activation_exponent=0.5)
    quantization = dataclasses.replace(recipes.fireq(), smoothing=smoothing, keep_float=("*.mlp.experts.down_proj",))
    output = tmp_path / "converted"
    report = convert(
        ConversionOptions(source, output, "fireq", quantization, dtype="float32", batch_size=4), tokens, progress=False
    )
    errors = report["layers"]["layers.0"]["weight_error"]
    assert sorted(errors) == ["mlp.experts.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
    model = AutoModelForCausalLM.from_pretrained(output, dtype=jnp.float32)
    assert model.config == config_from_huggingface(FIELDS)
    parameters = parameters_of(model)
    assert isinstance(parameters["layers.0.mlp.experts.gate_up_proj.weight"], QuantizedTensor)
    assert parameters["layers.0.mlp.experts.down_proj.weight"].shape == (4, 48, 40)
    exact = AutoModelForCausalLM.from_pretrained(source, dtype=jnp.float32)(tokens[:1])
    error = jnp.linalg.norm(model(tokens[:1]) - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.3
