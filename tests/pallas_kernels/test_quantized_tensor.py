"""QuantizedTensor: bytes, invisible padding, pytree behaviour and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, layouts
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.quantized_tensor import quantize as quantize_eagerly

OPTIONS = ("format", "group_size", "scale_dtype", "channel_scale", "rounding")
quantize = jax.jit(quantize_eagerly, static_argnames=OPTIONS)
quantize_weight = jax.jit(formats.quantize_weight, static_argnames=OPTIONS[1:])
dequantize = jax.jit(QuantizedTensor.dequantize)

SHAPES = [(128, 256), (1, 1), (70, 200), (64, 129)]


def weight(shape, seed=0):
    return np.float32(0.02 * np.random.default_rng(seed).standard_normal(shape))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize(("scale_dtype", "scale_bytes"), [("e4m3", 1), ("bf16", 2)])
def test_memory_is_4_bits_a_weight_and_the_scales(scale_dtype, scale_bytes, group_size):
    tensor = quantize(weight((192, 384)), scale_dtype=scale_dtype, group_size=group_size)
    assert tensor.group_size == group_size
    assert tensor.values.nbytes == 192 * 384 // 2
    assert tensor.nbytes == 192 * 384 // 2 + 192 * (384 // group_size) * scale_bytes + 192 * 4
    assert tensor.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tensor))


@pytest.mark.parametrize("format", ["fp4", "nf4"])
def test_other_codebooks_pack_the_same_way(format):
    w = weight((70, 200))
    tensor = quantize(w, format=format, rounding="table")
    assert tensor.nbytes == quantize(w).nbytes
    wide = np.pad(w, ((0, 0), (0, 56)))
    expected = formats.quantize_weight(wide, rounding="table", codebook=format)
    values = formats.dequantize_weight(expected, format)[:, :200]
    np.testing.assert_allclose(dequantize(tensor), values, rtol=1e-6)
    # Between a group's largest magnitudes the steps are at most 2/6 (FP4) and 2.2/7 of its largest weight.
    assert np.max(np.abs(values - w)) < 0.19 * np.abs(w).max()
    random = QuantizedTensor.random(jax.random.key(0), (128, 256), format=format)
    assert jnp.isfinite(random.dequantize()).all()


def test_fp8_memory_is_a_byte_a_weight_and_a_scale_a_channel():
    assert quantize(weight((70, 200)), format="fp8").nbytes == 70 * 200 + 70 * 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16"])
def test_padding_is_invisible(shape, group_size, scale_dtype):
    """A padded weight dequantizes to what the formats say of the weight extended by zeros."""
    w = weight(shape)
    tensor = quantize(w, scale_dtype=scale_dtype, group_size=group_size)
    assert tensor.shape == shape
    assert tensor.group_size == group_size
    wide = np.pad(w, ((0, 0), (0, -shape[1] % 128)))
    expected = quantize_weight(wide, group_size=group_size, scale_dtype=scale_dtype)
    np.testing.assert_array_equal(dequantize(tensor), jax.jit(formats.dequantize_weight)(expected)[:, : shape[1]])
    codes = jax.jit(QuantizedTensor.codes)(tensor)
    assert codes.codes.shape == shape
    assert codes.group_scale.shape == (shape[0], -(-shape[1] // group_size))
    np.testing.assert_array_equal(codes.codes, expected.codes[:, : shape[1]])


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_dequantized_weight_is_close(format):
    """Gaussian rows: uniform rounding in steps of absmax / 7 (about 2.6 sigma / 7), or 3 mantissa bits."""
    w = weight((96, 256))
    error = np.linalg.norm(dequantize(quantize(w, format=format)) - w) / np.linalg.norm(w)
    assert error < {"int4": 0.13, "fp8": 0.03}[format]


@pytest.mark.parametrize("options", [{}, {"scale_dtype": "bf16"}, {"format": "fp8"}], ids=str)
def test_is_a_pytree_under_jit_and_round_trips(options):
    tensor = quantize(weight((70, 200)), **options)
    leaves, structure = jax.tree.flatten(tensor)
    same(jax.tree.unflatten(structure, leaves), tensor)
    same(jax.jit(lambda x: x)(tensor), tensor)
    np.testing.assert_array_equal(dequantize(tensor), tensor.dequantize())
    assert jax.eval_shape(lambda: tensor).shape == (70, 200)
    assert hash(structure) == hash(jax.tree.structure(tensor))


@pytest.mark.parametrize(("k", "group_size"), [(384, 128), (192, 64)])
def test_from_codes_and_codes_are_inverse(k, group_size):
    """K = 192 is one and a half tiles: a group of padding is added and taken away."""
    w = quantize_weight(weight((70, k)), group_size=group_size)
    again = jax.jit(lambda w: QuantizedTensor.from_codes(w).codes())(w)
    for one, two in zip(again, w, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


@pytest.mark.parametrize("options", [{}, {"scale_dtype": "bf16", "group_size": 64}, {"format": "fp8"}], ids=str)
def test_random_weights_have_the_form_of_quantized_ones_and_the_wished_size(options):
    made = jax.jit(lambda key: QuantizedTensor.random(key, (200, 400), std=0.05, **options))(jax.random.key(0))
    real = jax.eval_shape(lambda w: quantize_eagerly(w, **options), jax.ShapeDtypeStruct((200, 400), jnp.float32))
    assert jax.tree.structure(made) == jax.tree.structure(real)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(made)] == [(x.shape, x.dtype) for x in jax.tree.leaves(real)]
    values = np.asarray(dequantize(made))
    assert np.all(np.isfinite(values))
    assert values.std() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("options", "quoted"), [({"format": "int8"}, "'int8'"), ({"group_size": 32}, "32"), ({"group_size": 256}, "256")]
)
def test_quantize_quotes_what_it_refuses(options, quoted):
    with pytest.raises(ValueError, match=quoted):
        quantize_eagerly(weight((64, 128)), **options)


def test_from_codes_refuses_other_groups():
    """Groups of 100 inputs would be read back as 128."""
    with pytest.raises(ValueError, match=r"\(8, 300\) and 3 groups"):
        QuantizedTensor.from_codes(formats.quantize_weight(weight((8, 300)), group_size=100))


def test_fp8_has_no_codes():
    with pytest.raises(ValueError, match="'fp8'"):
        quantize(weight((8, 16)), format="fp8").codes()


def test_random_padding_contributes_nothing():
    tensor = QuantizedTensor.random(jax.random.key(0), (70, 200))
    codes = layouts.unpack_weight(tensor.values, *layouts.padded_shape(70, 200))
    assert jnp.any(codes[:70, :200] != 0)
    assert not jnp.any(codes.at[:70, :200].set(0))
    assert jnp.all(tensor.channel_scale[70:] == 1)
    assert jnp.all(tensor.group_scale[:, 70:] == 1)
