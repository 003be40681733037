"""A bias in what a matmul left in parts: who finishes the sum adds it, RoPE like the norms."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from poisoned_memory import poison
from random_partials import random_partials

from pallas_kernels import dispatch, formats
from pallas_kernels.matmul import unreduced_matmul
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.rope_quantize import rope_quantize
from pallas_kernels.split_k import SplitKPartials

BIASES = [jnp.bfloat16, jnp.float32]


def rope_operands(dtype):
    """Biased parts of q, k and v of 3 sequences with 4 + 2 + 2 heads, and what else RoPE reads."""
    keys = jax.random.split(jax.random.key(0), 3)
    packed = random_partials((3, 1), 1024, 1024, 4, bias=(3 * jax.random.normal(keys[0], (1024,))).astype(dtype))
    angles = jax.random.uniform(keys[1], (3, 1, 64), maxval=100.0)
    cache = formats.quantize_kv(jax.random.normal(keys[2], (3, 2, 40, 128), jnp.bfloat16), "int4")
    lengths = jnp.ones((3,), jnp.int32)
    return (packed, jnp.cos(angles), jnp.sin(angles), cache, cache), {"start": 7 * lengths, "lengths": lengths}


def test_bias_is_added_in_float32_before_the_residual():
    total = random_partials(
        (6,), 48, 64, 4, bias=jnp.linspace(-3, 3, 48), residual=jnp.full((6, 48), 0.5, jnp.bfloat16)
    )
    y = np.asarray(total.parts, np.float64).sum(0)[:, :48] * np.asarray(total.channel_scale, np.float64)[:48]
    y = y * np.asarray(total.x_scale, np.float64)[:, None] + np.asarray(total.bias, np.float64) + 0.5
    # bf16's half step, and float32 sums of parts that are larger than what is left of them.
    np.testing.assert_allclose(total.reduce().astype(np.float32), y, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, *BIASES])
def test_a_matmul_with_a_bias_may_leave_its_sum_in_parts(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    weight = jax.eval_shape(lambda: QuantizedTensor.random(jax.random.key(0), (4096, 14336)))
    rows = jax.eval_shape(lambda: formats.quantize_fp8(jnp.ones((128, 14336))))
    bias = None if dtype is None else jax.ShapeDtypeStruct((4096,), dtype)
    y = jax.eval_shape(lambda *operands: unreduced_matmul(*operands[:2], bias=operands[2]), rows, weight, bias)
    assert isinstance(y, SplitKPartials)


@pytest.mark.parametrize("dtype", BIASES)
def test_rope_of_a_biased_sum_lowers_for_cuda(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    operands, named = jax.eval_shape(lambda: rope_operands(dtype))
    exported = jax.export.export(jax.jit(rope_quantize), platforms=["cuda"])(*operands, **named)
    assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BIASES)
def test_rope_adds_the_bias_as_the_reference_does(dtype):
    """A float32 rounding may move an element over a rounding boundary: a step of E4M3 or INT4, of few elements."""
    operands, named = rope_operands(dtype)
    poison((3, 1, 1024))
    results = []
    for implementation in ("mosaic_gpu", "xla"):
        function = jax.jit(functools.partial(rope_quantize, implementation=implementation))
        results.append([np.asarray(formats.dequantize(rows)) for rows in function(*operands, **named)])
    for found, expected in zip(*results, strict=True):
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
        assert np.mean(~np.isclose(found, expected, rtol=1e-2, atol=1e-3)) < 0.02
