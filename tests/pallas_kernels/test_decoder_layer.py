"""A decoder layer's ops against float64: every order of norms, biases, activations, float and quantized weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_layers import EPS, ORDERS, random_inputs, random_layer

from pallas_kernels import decoder_layer
from pallas_kernels.decoder_layer import after_attention, before_attention
from pallas_kernels.norm import Norm
from pallas_kernels.projection import Projection
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.split_k import reduced

SIZES = 64, 40, 96
GATES = {
    "silu_mul": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh_mul": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def two_layers(attention, x, layer, tap=None):
    """Packed, the layer's output, packed of the next one, which has the same weights, and what that begins with."""
    packed, stream = before_attention(ResidualStream(x), layer, implementation="xla", tap=tap)
    stream = after_attention(attention, stream, layer, implementation="xla", tap=tap)
    following, begun = before_attention(stream, layer, implementation="xla")
    return reduced(packed), stream.finish(), reduced(following), begun.finish()


def float64(x):
    return np.asarray(x.dequantize() if isinstance(x, QuantizedTensor) else x, np.float64)


def norm64(x, norm):
    if norm is None:
        return x
    x = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * float64(norm.weight)


def expected(attention, x, layer):
    """What ``two_layers`` returns, and what a tap sees."""

    def linear(x, projection):
        y = x @ float64(projection.weight).T
        return y if projection.bias is None else y + float64(projection.bias)

    attention, x = float64(attention), float64(x)
    begin = norm64(x, layer.input_norm)
    y = x + norm64(linear(attention, layer.o_proj), layer.attention_output_norm)
    middle = begin if layer.parallel else norm64(y, layer.mlp_norm)
    blocks = linear(middle, layer.gate_up).reshape(*y.shape[:-1], -1, 2, 8)
    gate, up = (blocks[..., i, :].reshape(*y.shape[:-1], -1) for i in range(2))
    hidden = (GATES[layer.activation](gate) * up)[..., : layer.down.weight.shape[1]]
    y = y + norm64(linear(hidden, layer.down), layer.mlp_output_norm)
    results = linear(begin, layer.qkv), y, linear(norm64(y, layer.input_norm), layer.qkv), y
    return results, {"qkv_input": begin, "gate_up_input": middle, "down_input": hidden}


def error(x, exact):
    return np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("float_part", ["qkv", "gate_up", "o_proj", "down"])
@pytest.mark.parametrize("order", ["pre", "parallel"])
def test_any_projection_may_be_float_beside_quantized_ones(order, float_part):
    """What a norm's two readers take decides in what form both get its rows."""
    layer = random_layer(*SIZES, order=order)
    plain = getattr(layer, float_part)
    weight = plain.weight.dequantize().astype(jnp.float32)
    layer = dataclasses.replace(layer, **{float_part: dataclasses.replace(plain, weight=weight)})
    inputs = random_inputs(3, 64, jnp.float32)
    results, _ = expected(*inputs, layer)
    for found, exact in zip(two_layers(*inputs, layer), results, strict=True):
        assert error(found, exact) < 0.05  # FP8 rows


@pytest.mark.parametrize("weights", ["float", "int4, float rows"])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("bias", [None, jnp.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_float_rows_are_computed_as_in_float64(order, bias, activation, weights):
    """And a tap sees what is multiplied, which changes no bit of the results."""
    options = {"float": jnp.float32} if weights == "float" else {"fp8_rows": False}
    kind = "layer" if order == "parallel" else "rms"
    layer = random_layer(*SIZES, order=order, kind=kind, bias=bias, activation=activation, **options)
    inputs = random_inputs(3, 64, jnp.float32)
    seen = {}
    found = jax.jit(two_layers)(*inputs, layer)
    tapped = jax.jit(lambda *arguments: (two_layers(*arguments, seen.__setitem__), seen))(*inputs, layer)
    exact, to_be_seen = expected(*inputs, layer)
    for x, y, again in zip(found, exact, tapped[0], strict=True):
        assert error(x, y) < 1e-5
        np.testing.assert_array_equal(x, again)
    assert set(tapped[1]) == set(to_be_seen)
    for name, y in to_be_seen.items():
        assert error(tapped[1][name], y) < 1e-5, name


@pytest.mark.parametrize("bias", [None, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_fp8_rows_lose_what_fp8_loses(order, bias):
    """E4M3 rows lose 2.6% (rms) at up to three places in a row; a tap sees the one input that is not only in FP8."""
    kind = "layer" if order == "parallel" else "rms"
    layer = random_layer(*SIZES, order=order, kind=kind, bias=bias)
    inputs = random_inputs(3, 64)
    seen = {}
    found = jax.jit(lambda *arguments: two_layers(*arguments, seen.setdefault("tap", {}).__setitem__))(*inputs, layer)
    for x, y in zip(found, expected(*inputs, layer)[0], strict=True):
        assert x.dtype == jnp.bfloat16
        assert 1e-3 < error(x, y) < 0.06
    assert set(seen["tap"]) == {"down_input"}


def test_norms_with_different_eps_are_both_kept():
    """One pass over a sum and its next norm has one eps; with two it is two passes."""
    layer = random_layer(*SIZES, order="sandwich")
    assert layer.mlp_norm is not None
    # As much as the stream's mean square: without it the hidden rows would be half as large again.
    layer = dataclasses.replace(layer, mlp_norm=dataclasses.replace(layer.mlp_norm, eps=4.0))
    inputs, seen = random_inputs(3, 64), {}
    found, seen = jax.jit(lambda *arguments: (two_layers(*arguments, seen.__setitem__), seen))(*inputs, layer)
    exact, to_be_seen = expected(*inputs, layer)
    assert error(seen["down_input"], to_be_seen["down_input"]) < 0.1
    assert error(found[1], exact[1]) < 0.06


def test_two_kernels_are_for_few_tokens_of_a_common_layer():
    """What they cannot do is said, and done by an op for each step."""

    def layer_of(**options):
        return jax.eval_shape(lambda: random_layer(512, 1024, 768, **options))

    def rows(count, dtype=jnp.bfloat16):
        return ResidualStream(jax.ShapeDtypeStruct((count, 512), dtype))

    x, layer = rows(1), layer_of()
    other = Projection(jax.ShapeDtypeStruct((768, 512), jnp.float32))
    for stream, weights, reason in [
        (x, layer, None),
        (x, layer_of(bias=jnp.bfloat16, activation="gelu_tanh_mul"), None),
        (rows(5), layer, "5 rows, not 1 to 4"),
        (rows(1, jnp.float32), layer, "dtype float32"),
        (x, layer_of(order="post"), "do not both begin with an RMSNorm"),
        (x, layer_of(order="sandwich"), "a norm after it"),
        (x, layer_of(order="parallel"), "do not both begin with an RMSNorm"),
        (x, layer_of(kind="layer"), "do not both begin with an RMSNorm"),
        (x, layer_of(bias=jnp.float16), "a bias has dtype float16"),
        (x, layer_of(fp8_rows=False), "does not multiply FP8 rows"),
        (x, dataclasses.replace(layer, qkv=other), "does not multiply FP8 rows"),
        (x, dataclasses.replace(layer, down=layer_of(format="fp8").down), "a weight is FP8"),
    ]:
        message = decoder_layer.unsupported(stream, weights)
        assert message == reason or reason in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": Projection(jnp.zeros((96, 63)))}, r"qkv has shape \(96, 63\); expected \(96, 64\)"),
        ({"o_proj": Projection(jnp.zeros((63, 64)))}, r"o_proj has shape \(63, 64\)"),
        ({"gate_up": Projection(jnp.zeros((96, 64)))}, r"gate_up has shape \(96, 64\); expected \(80, 64\)"),
        ({"mlp_norm": Norm(jnp.ones(63), EPS)}, r"mlp_norm has shape \(63,\); expected \(64,\)"),
        ({"mlp_output_norm": Norm(jnp.ones(64), EPS, "layer")}, "kind 'layer'; expected 'rms'"),
        ({"activation": "none"}, "activation is 'none'"),
        ({"parallel": True}, "has an mlp_norm"),
    ],
)
def test_errors_quote_what_is_wrong(changes, message):
    attention, x = random_inputs(3, 64)
    layer = dataclasses.replace(random_layer(*SIZES), **changes)
    with pytest.raises(ValueError, match=message):
        before_attention(ResidualStream(x), layer)
    with pytest.raises(ValueError, match=message):
        after_attention(attention, ResidualStream(x), layer)
