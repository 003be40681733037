"""The matmul op's reference against float64 products of the dequantized operands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import matmul as matmul_eagerly
from pallas_kernels.matmul_epilogue import gelu_tanh
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.quantized_tensor import quantize as quantize_eagerly

matmul = jax.jit(matmul_eagerly, static_argnames=("activation", "out_dtype", "implementation"))
quantize = jax.jit(
    quantize_eagerly, static_argnames=("format", "group_size", "scale_dtype", "channel_scale", "rounding")
)
unscaled = jax.jit(QuantizedTensor.unscaled)
quantize_fp8 = jax.jit(formats.quantize_fp8)

KINDS = {
    "int4": {},
    "int4 groups of 64": {"group_size": 64},
    "bf16 scales": {"scale_dtype": "bf16"},
    "power of two": {"channel_scale": "per_tensor_pow2", "rounding": "table"},
    "fp8": {"format": "fp8"},
}

# Of gates, in float64, as papers have them.
GATES = {
    "silu_mul": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh_mul": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float64(x):
    if isinstance(x, ScaledArray):
        return np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)
    return np.asarray(x, np.float64)


def expected(x, weight, bias=None, activation="none", residual=None):
    unit, scale = np.asarray(unscaled(weight), np.float64), np.asarray(weight.channel_scale, np.float64)
    y = float64(x) @ (unit * scale[: len(unit), None]).T
    if bias is not None:
        y = y + float64(bias)
    if activation != "none":
        blocks = y.reshape(*y.shape[:-1], -1, 2, 8)
        gate, up = blocks[..., 0, :], blocks[..., 1, :]
        y = (GATES[activation](gate) * up).reshape(*y.shape[:-1], -1)
    return y if residual is None else y + float64(residual)


def check(x, weight, **options):
    """float32 sums of K products against float64: 2^-24 sqrt(K) of the sum of magnitudes, with room."""
    y = np.asarray(matmul(x, weight, out_dtype=jnp.float32, implementation="xla", **options))
    reference = expected(x, weight, **options)
    assert y.shape == reference.shape
    np.testing.assert_allclose(y, reference, atol=2e-6 * np.abs(reference).max(), rtol=2e-6)


@pytest.mark.parametrize("activations", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_weight_and_activation(kind, activations):
    """N and K are not multiples of the tile; W4A16 multiplies float rows as they are."""
    weight = quantize(0.02 * normal(0, (80, 200)), **KINDS[kind])
    x = normal(1, (3, 200))
    check(quantize_fp8(x) if activations == "fp8" else x.astype(activations), weight)


@pytest.mark.parametrize("activation", ["none", *GATES])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogues(activation, with_bias, with_residual):
    """activation(y + bias) + residual, over two row dimensions."""
    weight = quantize(normal(2, (48, 130)))
    n_out = 48 if activation == "none" else 24
    check(
        quantize_fp8(normal(3, (2, 3, 130))),
        weight,
        bias=normal(4, (48,)).astype(jnp.bfloat16) if with_bias else None,
        activation=activation,
        residual=normal(5, (2, 3, n_out)).astype(jnp.bfloat16) if with_residual else None,
    )


def test_gelu_keeps_the_digits_of_small_results():
    """Of x = -5 it is -2.3e-7, and 1 + tanh in float32 would know that to a twentieth."""
    x = np.linspace(-5, 9, 200, dtype=np.float32)
    np.testing.assert_allclose(gelu_tanh(jnp.asarray(x)), GATES["gelu_tanh_mul"](x.astype(np.float64)), rtol=1e-5)
    np.testing.assert_array_equal(gelu_tanh(jnp.asarray([-1e30, 0, 1e30])), np.float32([0, 0, 1e30]))
    assert np.isnan(gelu_tanh(jnp.asarray(jnp.nan)))


def test_interleaved_weight_gives_silu_of_gate_times_up():
    """11 gate rows fill up to 16; the added outputs are exactly 0."""
    gate, up, x = normal(6, (11, 64)), normal(7, (11, 64)), normal(8, (5, 64))
    weight = quantize(layouts.interleave_gate_up(gate, up), scale_dtype="bf16")
    y = matmul(x, weight, activation="silu_mul", out_dtype=jnp.float32, implementation="xla")
    gate, up = (np.asarray(quantize(w, scale_dtype="bf16").dequantize(), np.float64) for w in (gate, up))
    g = x @ gate.T
    np.testing.assert_allclose(y[:, :11], g / (1 + np.exp(-g)) * (x @ up.T), rtol=1e-4, atol=1e-4)
    assert not y[:, 11:].any()


def test_result_has_the_wished_dtype_and_nan_shows():
    weight = quantize(normal(9, (16, 128)))
    x = normal(10, (2, 128))
    x[0, 5] = np.nan
    y = matmul(quantize_fp8(x), weight, implementation="xla")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.isnan(np.asarray(y)), [[True] * 16, [False] * 16])


def test_a_single_row():
    weight = QuantizedTensor.random(jax.random.key(0), (70, 200))
    x = normal(11, (200,))
    y = matmul(x, weight, implementation="xla")
    assert y.shape == (70,)
    np.testing.assert_allclose(y.astype(jnp.float32), expected(x, weight), rtol=2**-8, atol=1e-6)


X = ScaledArray(jnp.zeros((2, 128), formats.E4M3), jnp.ones((2, 1)))


@pytest.mark.parametrize(
    ("x", "options", "quoted"),
    [
        (jnp.zeros((2, 127)), {}, r"\(2, 127\).*\(24, 128\)"),
        (jnp.zeros((2, 128), jnp.int8), {}, "int8"),
        (jnp.zeros((2, 128), formats.E4M3), {}, "float8_e4m3fn"),
        (ScaledArray(jnp.zeros((2, 128)), None, "none"), {}, "float32; expected float8_e4m3fn with a scale"),
        (dataclasses.replace(X, scale=jnp.ones((2,))), {}, r"\(2,\); expected \(2, 1\)"),
        (X, {"bias": jnp.zeros((12,))}, r"\(12,\); expected \(24,\)"),
        (X, {"residual": jnp.zeros((2, 12))}, r"\(2, 12\); expected \(2, 24\)"),
        (X, {"activation": "gelu"}, "'gelu'"),
        (X, {"activation": "silu_mul"}, r"\(24, 128\).*16"),
        (X, {"activation": "gelu_tanh_mul"}, "gelu_tanh_mul expects N to be a multiple of 16"),
        (X, {"implementation": "cuda"}, "'cuda'"),
    ],
)
def test_errors_quote_the_offending_value(x, options, quoted):
    weight = quantize(jnp.zeros((24, 128)))
    with pytest.raises(ValueError, match=quoted):
        matmul_eagerly(x, weight, **options)
