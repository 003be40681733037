"""Error compensation: what counts is the layer's output, and that is what gets better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.algorithms.gptq import InputMoments, compensate, compensated_target, quantize_measured
from checkpoints_convert.algorithms.weight_search import search_weight
from fireq_jax.quantization import QuantizationConfig
from pallas_kernels import formats

ROWS, INPUTS, TOKENS = 32, 256, 2048


def weight_of() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (ROWS, INPUTS)) * 0.02


def inputs_of(seed: int = 1) -> jax.Array:
    """Correlated inputs, as the hidden states of a model are."""
    mixing = jax.random.normal(jax.random.key(7), (INPUTS, INPUTS)) / np.sqrt(INPUTS) + 0.5 * jnp.eye(INPUTS)
    return jax.random.normal(jax.random.key(seed), (TOKENS, INPUTS)) @ mixing


def output_error(weight: jax.Array, exact: jax.Array, inputs: jax.Array) -> float:
    return float(jnp.linalg.norm(inputs @ (weight - exact).T) / jnp.linalg.norm(inputs @ exact.T))


def moments_of(inputs: jax.Array) -> jax.Array:
    return inputs.T @ inputs / len(inputs)


def test_output_of_unseen_inputs_is_closer_than_by_rounding_alone() -> None:
    weight, hessian = weight_of(), moments_of(inputs_of())
    rounded = search_weight(weight, jnp.diagonal(hessian))
    channel = formats.weight_channel_scale(weight, "per_channel")
    gptq, descended = (compensate(weight, hessian, channel, passes=passes) for passes in (0, 4))
    unseen = inputs_of(seed=2)
    errors = [output_error(formats.dequantize_weight(codes), weight, unseen) for codes in (rounded, gptq, descended)]
    assert errors[1] < 0.85 * errors[0]
    assert errors[2] < 0.95 * errors[1]


@pytest.mark.parametrize("codebook", ["fp4", "nf4"])
def test_other_codebooks_are_compensated_too(codebook: formats.Codebook) -> None:
    weight, hessian, unseen = weight_of(), moments_of(inputs_of()), inputs_of(seed=2)
    rounded = search_weight(weight, jnp.diagonal(hessian), codebook=codebook)
    channel = formats.weight_channel_scale(weight, "per_channel")
    kept = compensate(weight, hessian, channel, codebook=codebook)
    errors = [output_error(formats.dequantize_weight(codes, codebook), weight, unseen) for codes in (rounded, kept)]
    assert errors[1] < 0.85 * errors[0]


def test_descent_never_undoes() -> None:
    weight, hessian = weight_of(), moments_of(inputs_of())
    channel = formats.weight_channel_scale(weight, "per_channel")
    factor = jnp.linalg.cholesky(hessian)
    costs = []
    for passes in range(4):
        codes = compensate(weight, hessian, channel, search=False, damping=0.0, passes=passes)
        costs.append(float(jnp.sum(jnp.square((formats.dequantize_weight(codes) - weight) @ factor))))
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < costs[0]


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight = weight_of()
    channel = formats.weight_channel_scale(weight, "per_channel")
    codes = compensate(weight, jnp.eye(INPUTS), channel, search=False)
    expected = formats.quantize_weight(weight, rounding="table")
    np.testing.assert_array_equal(codes.codes, expected.codes)
    np.testing.assert_array_equal(codes.group_scale.astype(jnp.float32), expected.group_scale.astype(jnp.float32))


def test_target_makes_up_for_disturbed_inputs() -> None:
    weight, exact = weight_of(), inputs_of()
    seen = exact @ (jnp.eye(INPUTS) + 0.1 * jax.random.normal(jax.random.key(3), (INPUTS, INPUTS)) / np.sqrt(INPUTS))
    cross, hessian = exact.T @ seen / TOKENS, moments_of(seen)
    found = compensated_target(weight, cross, hessian, damping=1e-4)
    missed = [float(jnp.linalg.norm(exact @ weight.T - seen @ w.T)) for w in (weight, found)]
    assert missed[1] < 0.1 * missed[0]
    unchanged = compensated_target(weight, hessian, hessian, damping=0.1)
    np.testing.assert_allclose(unchanged, weight, atol=1e-6)


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16"])
@pytest.mark.parametrize("compensated", [False, True])
def test_ragged_widths_and_dead_inputs_are_quantized(scale_dtype: formats.ScaleDtype, compensated: bool) -> None:
    inputs = inputs_of()[:, :200].at[:, 17].set(0)
    weight = weight_of()[:, :200]
    config = QuantizationConfig(
        scale_dtype=scale_dtype, rounding="table", scale_search=True, error_compensation=compensated
    )
    tensor = quantize_measured(weight, InputMoments(moments_of(inputs)), config)
    assert tensor.shape == (ROWS, 200)
    found = tensor.dequantize()
    assert bool(jnp.all(jnp.isfinite(found)))
    assert 0 < output_error(found, weight, inputs) < 0.15
