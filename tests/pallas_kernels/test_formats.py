"""Number formats against brute force, ml_dtypes and exact float64 arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import formats
from pallas_kernels.codebooks import register_codebook
from pallas_kernels.formats import E4M3, WeightCodes
from pallas_kernels.quantized_tensor import quantize

# Every finite non-negative E4M3 number, in the order of its code 0x00 .. 0x7e.
POSITIVE = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
GROUP_SCALES = POSITIVE[(POSITIVE > 0) & (POSITIVE <= 64)]
even_shapes = st.tuples(st.integers(1, 3), st.integers(1, 4).map(lambda n: 2 * n))
codes_arrays = hnp.arrays(np.int8, even_shapes, elements=st.integers(-7, 7))
quantize_weight = jax.jit(
    formats.quantize_weight, static_argnames=("group_size", "scale_dtype", "channel_scale", "rounding")
)
dequantize_weight = jax.jit(formats.dequantize_weight)
decode_weight = jax.jit(formats.decode_weight)


def weight(seed=0, shape=(24, 256), spread=1.0):
    """Gaussian rows of very different sizes, as channels of a trained matrix have."""
    rng = np.random.default_rng(seed)
    rows = np.exp(spread * rng.standard_normal((shape[0], 1)))
    return jnp.asarray(0.02 * rows * rng.standard_normal(shape), jnp.float32)


def as_bytes(x):
    return np.asarray(x).view(np.uint8)


# --- E4M3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [formats.to_e4m3, jax.jit(formats.to_e4m3)], ids=["eager", "jit"])
def test_e4m3_rounds_to_nearest_with_ties_to_even(cast):
    """Between codes c and c + 1: the midpoint goes to the even one, its float32 neighbours to the nearer."""
    below, middle = np.arange(0x7E, dtype=np.uint8), (POSITIVE[1:] + POSITIVE[:-1]) / 2
    up, down = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))
    np.testing.assert_array_equal(as_bytes(cast(middle)), below + below % 2)
    np.testing.assert_array_equal(as_bytes(cast(up)), below + 1)
    np.testing.assert_array_equal(as_bytes(cast(down)), below)
    np.testing.assert_array_equal(as_bytes(cast(-up)), below + 0x81)
    np.testing.assert_array_equal(as_bytes(cast(POSITIVE)), np.arange(0x7F))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_e4m3_equals_ml_dtypes_for_every_16_bit_number(dtype):
    """Saturating at 448, infinities too; NaN exactly where the input is NaN."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    result = np.asarray(formats.to_e4m3(jnp.asarray(x))).astype(np.float32)
    wide = x.astype(np.float32)
    with np.errstate(invalid="ignore"):  # numpy reports the NaNs
        expected = np.clip(wide, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(wide))
    np.testing.assert_array_equal(np.signbit(result), np.signbit(expected))
    np.testing.assert_array_equal(formats.round_to_e4m3(jnp.asarray(x)), expected)


def test_rounding_does_not_rest_on_the_cast():
    """XLA may drop a cast to E4M3 with the cast back; the numbers are rounded before."""
    jaxpr = str(jax.make_jaxpr(lambda x: formats.dequantize(formats.quantize_fp8(x)))(jnp.zeros((2, 8))))
    assert jaxpr.index("reduce_precision") < jaxpr.index("new_dtype=float8_e4m3fn")
    jaxpr = str(jax.make_jaxpr(lambda x: formats.round_group_scale(x, "bf16"))(jnp.zeros((2,))))
    assert jaxpr.index("reduce_precision") < jaxpr.index("new_dtype=bfloat16")


def test_fp8_rows_state_their_rule_for_zero_infinity_and_nan():
    rows = jnp.asarray([[0.0, -0.0, 0, 0], [jnp.inf, 2.0, -jnp.inf, 1], [jnp.nan, 2.0, 1, 0], [jnp.nan, jnp.inf, 0, 0]])
    values, scale = formats.quantize_fp8(rows)
    assert scale is not None
    np.testing.assert_array_equal(scale[:, 0], np.float32([1, 2 / 448, 2 / 448, 1]))
    expected = [[0, 0, 0, 0], [448, 448, -448, 224], [np.nan, 448, 224, 0], [np.nan, 448, 0, 0]]
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.float32(expected))


@pytest.mark.parametrize("exponent", [-100, -10, 0, 10, 100])
def test_fp8_rows_keep_half_a_unit_in_the_last_place(exponent):
    """Relative error of 2^-4 for normal numbers, absolute 2^-10 scales below; the largest is exact to rounding."""
    x = np.random.default_rng(1).standard_normal((16, 96)) * 2.0**exponent
    rows = formats.quantize_fp8(jnp.asarray(x, jnp.float32))
    error = np.abs(np.asarray(formats.dequantize(rows), np.float64) - x.astype(np.float32))
    # 1e-6: the divisions and multiplications by the scale are float32.
    assert np.all(error <= np.maximum(np.abs(x) * (2.0**-4 + 1e-6), np.asarray(rows.scale) * 2.0**-10))


# --- INT4 codes --------------------------------------------------------------------------------------


def test_int4_rounds_to_nearest_even_and_clamps_to_7():
    x = np.arange(-1000, 1001, dtype=np.float32) / 64
    codes = np.asarray(formats.round_to_int4(jnp.asarray(x)))
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.clip(np.rint(x), -7, 7))
    np.testing.assert_array_equal(formats.round_to_int4(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])), [0, 7, -7])


@settings(max_examples=25, deadline=None)
@given(codes_arrays)
def test_pack_int4_round_trip(codes):
    packed = formats.pack_int4(jnp.asarray(codes))
    assert packed.shape[-1] * 2 == codes.shape[-1]
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(formats.unpack_int4(packed), codes)


def test_pack_int4_uses_every_byte_once():
    """Element i has bits 7 and 0-2, i + H/2 bits 3 and 4-6; 15 x 15 pairs of codes are distinct bytes."""
    pairs = jnp.asarray([[low, high] for low in range(-7, 8) for high in range(-7, 8)], jnp.int8)
    packed = np.asarray(formats.pack_int4(pairs))[:, 0]
    expected = [128 * int(a < 0) + 16 * abs(int(b)) + 8 * int(b < 0) + abs(int(a)) for a, b in pairs]
    np.testing.assert_array_equal(packed, expected)
    # The other way: all 256 bytes; a negative zero reads as 0.
    everything = np.arange(256, dtype=np.uint8)[:, None]
    again = np.asarray(formats.pack_int4(formats.unpack_int4(jnp.asarray(everything))))
    canonical = np.where(everything & 0x87 == 0x80, everything & 0x7F, everything)
    np.testing.assert_array_equal(again, np.where(canonical & 0x78 == 0x08, canonical & 0xF7, canonical))


def test_pack_int4_refuses_an_odd_row():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        formats.pack_int4(jnp.zeros((2, 5), jnp.int8))


# --- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["e4m3", "bf16"])
def test_group_scales_are_never_zero(dtype):
    scales = jnp.asarray(np.logspace(-44, 38, 400), jnp.float32)
    rounded = np.asarray(formats.round_group_scale(scales, dtype), np.float32)
    assert np.all(rounded > 0)
    assert np.all(np.isfinite(rounded))
    if dtype == "e4m3":
        assert rounded.max() == 64  # 7 * 64 = 448


@pytest.mark.parametrize("exponent", range(-30, 7))
def test_per_tensor_scale_is_the_smallest_sufficient_power_of_two(exponent):
    """For absmax = 448 * 2^e exactly and one float32 above and below it."""
    limit = np.float32(448 * 2.0**exponent)
    for absmax, expected in [
        (limit, exponent),
        (np.nextafter(limit, np.float32(0)), exponent),
        (limit * np.float32(1.001), exponent + 1),
    ]:
        scale = np.asarray(formats.weight_channel_scale(jnp.asarray([[absmax], [0.0]]), "per_tensor_pow2"))
        np.testing.assert_array_equal(scale, np.float32(2.0) ** expected)


@pytest.mark.parametrize("channel_scale", ["per_channel", "per_tensor_pow2"])
@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16"])
def test_largest_magnitude_never_saturates(channel_scale, scale_dtype):
    codes = quantize_weight(weight(), scale_dtype=scale_dtype, channel_scale=channel_scale)
    assert np.asarray(codes.group_scale, np.float32).max() <= 64.25  # bf16 rounds 64 by up to 2^-9 of it
    assert np.all(np.abs(np.asarray(codes.codes)) <= 7)
    assert len(np.unique(np.asarray(codes.channel_scale))) == (1 if channel_scale == "per_tensor_pow2" else 24)


def test_codebooks_are_eight_rising_magnitudes():
    """FP4's are E2M1's, and NF4's the quantiles at equal steps of probability up to QLoRA's 0.9677, largest 7."""
    for magnitudes in formats.CODEBOOKS.values():
        assert len(magnitudes) == 8
        assert magnitudes[0] == 0
        assert np.all(np.diff(magnitudes) > 0)
        mantissas, _ = np.frexp(magnitudes)
        np.testing.assert_array_equal(mantissas * 2**7, np.round(mantissas * 2**7))
    every = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(formats.CODEBOOKS["fp4"], every)
    quantiles = np.asarray(jax.scipy.stats.norm.ppf(np.linspace(0.5, 0.9677083, 8)))
    np.testing.assert_allclose(formats.CODEBOOKS["nf4"], 7 * quantiles / quantiles[-1], atol=2**-6)


def test_a_registered_codebook_rounds_as_the_kernels_table_does():
    """Its products with every E4M3 scale are exact in float16, so that the kernel's one rounding is ours."""
    name, magnitudes = "tests_own", (0, 0.25, 0.75, 1.5, 2.25, 3.25, 4.5, 6.5625)
    register_codebook(name, magnitudes)
    register_codebook(name, list(magnitudes))
    product = GROUP_SCALES[:, None] * np.asarray(magnitudes, np.float32)
    np.testing.assert_array_equal(product.astype(np.float16).astype(np.float32), product)
    table = np.asarray(formats.weight_table(jnp.asarray(GROUP_SCALES).astype(E4M3), name))
    np.testing.assert_array_equal(table, product.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert [formats.is_e4m3(each) for each in ("int4", "fp4", "nf4", name)] == [True, True, False, False]
    tensor = quantize(weight(), format=name, scale_dtype="bf16")
    scale = jnp.repeat(tensor.codes().group_scale.astype(jnp.float32), 128, axis=1)
    assert set(np.unique(np.abs(np.asarray(tensor.unscaled() / scale)))) == set(magnitudes)


@pytest.mark.parametrize(
    ("name", "magnitudes", "quoted"),
    [
        ("fp4", range(8), "'fp4'; expected an identifier other than"),
        ("none", range(8), "'none'"),
        ("a b", range(8), "'a b'"),
        ("own", range(16), "expected eight rising magnitudes from 0: a code is a sign and three bits"),
        ("own", (0, 1, 2, 3, 5, 4, 6, 7), "eight rising"),
        ("own", (1, 2, 3, 4, 5, 6, 7, 8), "from 0"),
        ("own", (0, 1, 2, 3, 4, 5, 6, "7"), "expected eight numbers"),
        ("own", 8, "is 8; expected eight numbers"),
        ("own", jnp.arange(9), "eight rising"),
        ("own", (0, 1, 2, 3, 4, 5, 6, 7.123), r"7\.123; expected .* as in 7\.125"),
        ("own", (0, 1e-6, 2, 3, 4, 5, 6, 7), "1e-06; expected 0.001953125 to 448"),
        ("own", (0, 1, 2, 3, 4, 5, 6, float("inf")), "inf; expected"),
        ("own", (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875), "ends with 0.875"),
        ("taken", (0, 1, 2, 3, 4, 5, 6, 9), "is registered as .* give another name"),
    ],
)
def test_codebooks_that_cannot_be(name, magnitudes, quoted):
    register_codebook("taken", range(8))
    with pytest.raises(ValueError, match=quoted):
        register_codebook(name, magnitudes)
    assert "own" not in formats.CODEBOOKS


def test_table_is_what_the_tensor_core_reads():
    """decode_weight(q) = sign(q) * table[|q|] = fp8(q * sigma), for every scale and code."""
    q = np.tile(np.arange(-7, 8, dtype=np.int8), (len(GROUP_SCALES), 1))
    sigma = jnp.asarray(GROUP_SCALES[:, None]).astype(E4M3)
    values = np.asarray(decode_weight(jnp.asarray(q), sigma))
    table = np.asarray(formats.weight_table(sigma))[:, 0]
    np.testing.assert_array_equal(values, np.sign(q) * np.take_along_axis(table, np.abs(q), axis=1))
    product = q * GROUP_SCALES[:, None]  # at most 3 + 4 bits: exact in float32
    np.testing.assert_array_equal(values, product.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.all(np.diff(values) > 0)  # fifteen distinct values


def test_bf16_scales_are_exact():
    """q * sigma has at most 8 + 3 significant bits; INT4 codes themselves are exact in E4M3."""
    q = np.tile(np.arange(-7, 8, dtype=np.int8), (500, 1))
    sigma = jnp.exp(jnp.linspace(-20, 20, 500))[:, None].astype(jnp.bfloat16)
    values = np.asarray(decode_weight(jnp.asarray(q), sigma), np.float64)
    np.testing.assert_array_equal(values, q.astype(np.float64) * np.asarray(sigma, np.float64))
    np.testing.assert_array_equal(np.asarray(formats.to_e4m3(jnp.asarray(q)), np.float32), q)


@pytest.mark.parametrize("codebook", formats.CODEBOOKS)
def test_table_rounding_finds_the_nearest_value_and_is_never_worse(codebook):
    """Exhaustive over the E4M3 scales: 15 candidates by brute force."""
    sigma = jnp.asarray(GROUP_SCALES[:, None]).astype(E4M3)
    scaled = GROUP_SCALES[:, None] * np.linspace(-8, 8, 401, dtype=np.float32)
    every = jnp.tile(jnp.arange(-7, 8, dtype=jnp.int8), (len(sigma), 1))
    candidates = np.asarray(formats.decode_weight(every, sigma, codebook))
    best = np.abs(scaled[..., None] - candidates[:, None]).min(axis=-1)

    def error(rounding):
        codes = formats.encode_weight(jnp.asarray(scaled)[:, None], sigma, rounding, codebook)[:, 0]
        return np.abs(scaled - np.asarray(formats.decode_weight(codes, sigma, codebook)))

    np.testing.assert_array_equal(error("table"), best)
    assert np.all(error("nearest") >= best)
    assert np.any(error("nearest") > best)


@pytest.mark.parametrize("rounding", ["nearest", "table"])
@pytest.mark.parametrize("channel_scale", ["per_channel", "per_tensor_pow2"])
def test_fp8_scale_weight_error_is_bounded(channel_scale, rounding):
    """Half a code step, plus 2^-4 of the value for its own rounding to E4M3.

    Holds where sigma is a normal E4M3 number: it then rounds down by at most 2^-4 and 7.5 sigma
    still covers the group.
    """
    w = np.asarray(weight(), np.float64)
    codes = quantize_weight(jnp.asarray(w), channel_scale=channel_scale, rounding=rounding)
    sigma = np.repeat(np.asarray(codes.group_scale, np.float64), 128, axis=1)
    s = np.asarray(codes.channel_scale, np.float64)[:, None]
    error = np.abs(np.asarray(dequantize_weight(codes), np.float64) - w)
    bound = s * (sigma / 2 + np.abs(np.asarray(codes.codes)) * sigma * 2.0**-4)
    assert (sigma >= 2.0**-6).mean() > 0.9
    assert np.all((error <= bound * (1 + 1e-5)) | (sigma < 2.0**-6))


def test_bf16_scale_weight_error_is_half_a_step():
    w = np.asarray(weight(), np.float64)
    codes = quantize_weight(jnp.asarray(w), scale_dtype="bf16")
    sigma = np.repeat(np.asarray(codes.group_scale, np.float64), 128, axis=1)
    error = np.abs(np.asarray(dequantize_weight(codes), np.float64) - w)
    assert np.all(error <= np.asarray(codes.channel_scale)[:, None] * sigma / 2 * (1 + 1e-5))


def test_codes_survive_a_second_quantization():
    """A weight that already is codes times scales gets the same codes again."""
    first = quantize_weight(weight(), scale_dtype="bf16", channel_scale="per_tensor_pow2")
    again = quantize_weight(dequantize_weight(first), scale_dtype="bf16", channel_scale="per_tensor_pow2")
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


def test_weight_groups_of_zeros_and_broken_numbers():
    w = np.zeros((3, 256), np.float32)
    w[1, :2] = [np.nan, 1.0]
    w[2, 128:130] = [np.inf, -2.0]
    codes = quantize_weight(jnp.asarray(w))
    expected = np.zeros((3, 256))
    expected[1, 1] = 7
    expected[2, 128:130] = [7, -7]
    np.testing.assert_array_equal(codes.codes, expected)
    assert np.all(np.asarray(codes.channel_scale) > 0)
    np.testing.assert_array_equal(np.asarray(codes.group_scale, np.float32)[0], [1, 1])


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"group_size": 100}, "group_size 100"),
        ({"scale_dtype": "f16"}, "'f16'"),
        ({"channel_scale": "per_row"}, "'per_row'"),
        ({"rounding": "up"}, "'up'"),
    ],
)
def test_quantize_weight_quotes_what_it_refuses(options, quoted):
    with pytest.raises(ValueError, match=quoted):
        formats.quantize_weight(weight(), **options)


# --- keys and values, probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_kv_error_bounds_and_shapes(kv_format, group_size):
    """INT4: half a step of the (bf16-rounded) scale.  FP8: half a unit in the last place.  none: exact."""
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 64)).astype(np.float32)
    x[0, 0, 0] = 0
    rows = formats.quantize_kv(jnp.asarray(x), kv_format, group_size)
    error = np.abs(np.asarray(formats.dequantize(rows), np.float64) - x)
    if kv_format == "none":
        assert rows.scale is None
        assert not error.any()
        return
    assert rows.scale is not None
    assert rows.scale.shape == (2, 3, 5, 64 // (group_size or 64))
    scale = np.repeat(np.asarray(rows.scale, np.float64), group_size or 64, axis=-1)
    if kv_format == "int4":
        assert (rows.values.dtype, rows.values.shape[-1], rows.scale.dtype) == (jnp.uint8, 32, jnp.bfloat16)
        assert np.all(error <= scale / 2 * (1 + 1e-6))
    else:
        assert (rows.values.dtype, rows.values.shape[-1], rows.scale.dtype) == (E4M3, 64, jnp.float32)
        assert np.all(error <= np.maximum(np.abs(x) * (2.0**-4 + 1e-6), scale * 2.0**-10))
    assert not error[0, 0, 0].any()


@pytest.mark.parametrize(("arguments", "quoted"), [(("int8",), "'int8'"), (("int4", 24), "24.*64")])
def test_quantize_kv_quotes_what_it_refuses(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        formats.quantize_kv(jnp.zeros((1, 64)), *arguments)


def test_probabilities_keep_zero_and_one_and_their_order():
    p = jnp.linspace(0, 1, 4097)
    rounded = np.asarray(formats.quantize_probabilities(p))
    assert (rounded[0], rounded[-1]) == (0, 1)
    assert np.all(np.diff(rounded) >= 0)
    # Half a unit in the last place of 256 p in E4M3: 2^-4 relative, and 2^-10 / 256 below 2^-14.
    assert np.all(np.abs(rounded - np.asarray(p)) <= np.maximum(np.asarray(p) * 2.0**-4, 2.0**-18))


def test_nbytes_counts_every_array():
    codes = WeightCodes(jnp.zeros((4, 8), jnp.int8), jnp.zeros((4, 1), E4M3), jnp.zeros(4))
    assert formats.nbytes({"a": codes, "b": None}) == 32 + 4 + 16


# --- rows with their format ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_rows_say_what_they_are_stored_as(kv_format):
    """Under jit too, where the format is static, and as a tree whose leaves are something else."""
    rows = formats.quantize_kv(jnp.ones((2, 8)), kv_format)
    assert rows.format == kv_format
    assert rows.values.shape[-1] == formats.stored_width(kv_format, 8)
    assert jax.jit(lambda x: x)(rows).format == kv_format
    assert jax.tree.map(lambda x: jax.P(), rows).format == kv_format
    assert jax.eval_shape(lambda x: x, rows).format == kv_format
    assert (jax.tree.structure(rows) == jax.tree.structure(FP8_ROWS)) == (kv_format == "fp8")
    values, scale = rows
    assert values is rows.values
    assert scale is rows.scale


FP8_ROWS = formats.ScaledArray(jnp.zeros((2, 8), formats.E4M3), jnp.ones((2, 1)))


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"format": "int8"}, "format is 'int8'; expected one of .*'int4'"),
        ({"format": "int4"}, "dtype float8_e4m3fn and a scale; expected uint8 with a scale for format 'int4'"),
        ({"format": "none"}, "expected floats without a scale for format 'none'"),
        ({"scale": None}, "no scale; expected float8_e4m3fn with a scale"),
        ({"values": jnp.zeros((2, 8), jnp.uint8)}, "dtype uint8 and a scale; expected float8_e4m3fn"),
        ({"values": jnp.zeros((2, 8), jnp.uint8), "scale": None, "format": "none"}, "expected floats without a scale"),
    ],
)
def test_rows_are_stored_as_their_format_says(changes, quoted):
    with pytest.raises(ValueError, match=quoted):
        dataclasses.replace(FP8_ROWS, **changes)


def test_rows_of_integers_have_tangents():
    """JAX makes rows of those, which are no codes."""
    rows = formats.quantize_kv(jnp.ones((2, 8)), "int4")
    _, pull_back = jax.vjp(formats.dequantize, rows)
    [cotangent] = pull_back(jnp.ones((2, 8)))
    np.testing.assert_array_equal(cotangent.scale.astype(jnp.float32), [[56], [56]])
