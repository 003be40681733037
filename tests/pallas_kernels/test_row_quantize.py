"""Rows to FP8: what the ops promise, the kernels' numbers on a GPU and their lowering anywhere."""

import dataclasses
import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from poisoned_memory import poison
from random_partials import random_partials

from pallas_kernels import dispatch, formats
from pallas_kernels.matmul_epilogue import epilogue
from pallas_kernels.row_quantize import (
    add_post_norm,
    post_norm_quantize,
    quantize_rows,
    rms_norm_quantize,
    rms_norm_quantize_reference,
    sum_norm_quantize,
)
from pallas_kernels.sm90.common.ptx import WARPGROUP
from pallas_kernels.sm90.row_quantize import launch as sm90
from pallas_kernels.sm90.row_quantize.config import CHUNK, MAX_CHUNKS, MAX_WIDTH, Config, default_config, parts_config
from pallas_kernels.split_k import SplitKPartials

EPS = 1e-5
SHAPES = [(1, 4096), (5, 4096), (64, 14336), (300, 4096), (301, 5120), (3, 136), (2, 3, 1000), (7, 8), (9, 28672)]
# (rows, D, padded D, parts)
SUMS = [
    ((1,), 4096, 4096, 8),
    ((16, 1), 4096, 4096, 4),
    ((5,), 8192, 8192, 2),
    ((3,), 136, 192, 3),
    ((2, 2), 1000, 1024, 4),
]
BIASES = [None, jnp.bfloat16, jnp.float32]
# (rows, D, padded D, parts, bias's dtype); of no parts: the branch is whole.
POST_NORMS = [
    ((1,), 4096, 4096, 8, None),
    ((16, 1), 3840, 3840, 4, jnp.bfloat16),
    ((5,), 8192, 8192, 2, jnp.float32),
    ((3,), 136, 192, 3, None),
    ((301,), 5376, 5376, 0, None),
    ((2, 2), 1000, 1024, 0, None),
]
# A row in one block, in clusters that it fills and, most of these, in clusters that have more threads than it needs.
SUM_CONFIGS = [
    None,
    Config(8),
    *(Config(n, c) for n, c in ((1, 8), (3, 8), (4, 8), (1, 4), (2, 4), (3, 2), (4, 2))),
]
CONFIGS = [None, *(Config(warpgroups) for warpgroups in (1, 2, 3, 4, 7, 8))]


def random_rows(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Rows of very different sizes with a few large channels, in bf16."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], shape) * jnp.exp(3 * jax.random.normal(keys[1], (*shape[:-1], 1)))
    return (x * (1 + 50 * jax.random.bernoulli(keys[2], 0.01, shape[-1:]))).astype(jnp.bfloat16)


def special_rows(width: int) -> jax.Array:
    """Rows with zeros, Inf and NaN in every combination, and numbers at the ends of bf16."""
    x = np.array(random_rows((10, width)), np.float32)
    x[0] = 0
    x[1, 3] = np.inf
    x[2, -1] = -np.inf
    x[3, width // 2] = np.nan
    x[4, :2] = np.inf, np.nan
    x[5] = np.inf
    x[6] = np.nan
    x[7] = 1e-37  # its scale would be subnormal
    x[8, 0] = 3.3e38
    x[9] *= 1e-30
    return jnp.asarray(x, jnp.bfloat16)


def weight_of(width: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (width,), minval=0.1, maxval=2)


def bias_of(n: int, dtype: jax.typing.DTypeLike | None) -> jax.Array | None:
    return None if dtype is None else (3 * jax.random.normal(jax.random.key(n), (n,))).astype(dtype)


def residual_sum(rows: tuple[int, ...], n: int, padded: int, parts: int, **changes) -> SplitKPartials:
    """With a residual, as o_proj and down_proj leave it."""
    return random_partials(rows, n, padded, parts, **({"residual": random_rows((math.prod(rows), n))} | changes))


def on_cpu(function, *arguments):
    """The reference with exact reciprocals: XLA's on a GPU may be an ulp off."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function)(*jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), arguments))


def assert_same_numbers(actual, expected):
    """Equal as numbers: NaN is NaN, and the two zeros are one."""
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


# --- the reference --------------------------------------------------------------------------------


def test_quantize_rows_is_the_format():
    x = random_rows((2, 5, 64))
    for actual, expected in zip(quantize_rows(x), formats.quantize_fp8(x), strict=True):
        assert_same_numbers(actual, expected)


@given(
    # Few shapes: each is compiled.
    st.sampled_from([(1, 1), (2, 8), (4, 33)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32))
    ),
    st.floats(0.0625, 16, width=32),
)
@settings(deadline=None, max_examples=50)
def test_norm_then_quantize_is_within_a_rounding_of_the_float_norm(x, gain):
    weight = jnp.linspace(gain, 2 * gain, x.shape[1])
    rows = rms_norm_quantize(jnp.asarray(x), weight, EPS)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    # Half a step: 2^-4 of a normal number, 2^-10 of the scale below.
    allowed = np.abs(exact) * 2.0**-4 + np.asarray(rows.scale) * 2.0**-10
    assert (np.abs(formats.dequantize(rows) - exact) <= allowed * (1 + 1e-4) + 1e-30).all()


@given(st.integers(-20, 20))
@settings(deadline=None, max_examples=20)
def test_a_rows_size_is_only_in_its_scale(exponent):
    """Normalization and quantization both divide it away: powers of two change no value."""
    x, weight = random_rows((3, 64)).astype(jnp.float32), weight_of(64)
    rows, larger = (rms_norm_quantize(y, weight, 1e-30) for y in (x, x * 2.0**exponent))
    assert_same_numbers(larger.values, rows.values)
    np.testing.assert_allclose(larger.scale, rows.scale, rtol=1e-6)


def test_normalized_rows_that_are_not_finite_show():
    rows = rms_norm_quantize(special_rows(64), weight_of(64), EPS)
    broken = np.isnan(formats.dequantize(rows)).all(-1)
    assert broken.tolist() == [False, True, True, True, True, True, True, False, True, False]
    assert not np.asarray(formats.dequantize(rows)[0]).any()


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
@pytest.mark.parametrize("optional", [True, False])
def test_a_sum_is_finished_as_a_matmul_would_have(activation, optional):
    n = 96 if activation == "silu_mul" else 48
    rows = {"residual": random_rows((6, 48)), "bias": jnp.linspace(-1, 1, n)}
    total = residual_sum(
        (2, 3), n, 128, 4, activation=activation, **(rows if optional else dict.fromkeys((*rows, "x_scale")))
    )
    y = np.asarray(total.parts, np.float64).sum(0)[:, :n] * np.asarray(total.channel_scale, np.float64)[:n]
    if optional:
        y = y * np.asarray(total.x_scale)[:, None]
    expected = epilogue(jnp.asarray(y, jnp.float32), total.bias, activation, total.residual)
    assert total.reduce().shape == (2, 3, 48)
    # bf16's half step, and float32 sums of parts that are larger than what is left of them.
    np.testing.assert_allclose(total.reduce().reshape(6, 48).astype(np.float32), expected, rtol=2**-8, atol=1e-3)


def test_norm_of_a_sum_is_the_norm_of_what_it_finishes_as():
    total, weight = residual_sum((2, 3), 48, 64, 4), weight_of(48)
    rows, x = sum_norm_quantize(total, weight, EPS)
    assert_same_numbers(x, total.reduce())
    for actual, expected in zip(rows, rms_norm_quantize(x, weight, EPS), strict=True):
        assert_same_numbers(actual, expected)


def test_a_norm_of_a_sum_by_xla_is_by_xla_on_hopper_too(monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    total, weight = residual_sum((2, 3), 64, 64, 4), weight_of(64)
    for implementation, runs_kernel in (("xla", False), ("auto", True)):
        norm = functools.partial(sum_norm_quantize, eps=EPS, implementation=implementation)
        assert ("kernel_name" in str(jax.make_jaxpr(norm)(total, weight))) == runs_kernel


def post_norm_operands(rows: tuple[int, ...], n: int, padded: int, parts: int, bias=None):
    """A branch (a sum in parts, or whole without parts), its norm's weight, the residual and the next norm's weight."""
    total = random_partials(rows, n, padded, max(parts, 1), bias=bias_of(n, bias))
    post_weight = jax.random.uniform(jax.random.key(2), (n,), minval=0.1, maxval=2)
    residual = (2 * jax.random.normal(jax.random.key(3), (*rows, n))).astype(jnp.bfloat16)
    return total if parts else total.reduce(), post_weight, residual, weight_of(n)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("parts", [0, 4])
def test_post_norm_is_of_the_branch_and_the_next_of_the_sum(parts, pre_norm):
    """In float64, from what the branch is in bf16: x is a bf16 step off at most, and its rows half an E4M3 step."""
    branch, post_weight, residual, weight = post_norm_operands((2, 3), 48, 64, parts)
    rows, x = post_norm_quantize(branch, post_weight, residual, weight if pre_norm else None, EPS)
    y, old, gain, after = (
        np.asarray(array, np.float64) for array in (branch.reduce() if parts else branch, residual, post_weight, weight)
    )
    expected = old + y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS) * gain
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(x, np.float64), expected, rtol=2**-8, atol=1e-6)
    exact = np.asarray(x, np.float64)
    if pre_norm:
        exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS) * after
    allowed = np.abs(exact) * 2.0**-4 + np.asarray(rows.scale) * 2.0**-10
    assert (np.abs(formats.dequantize(rows) - exact) <= allowed * (1 + 1e-4)).all()


def test_post_norm_keeps_the_dtype_of_the_residual_and_shows_what_is_not_finite():
    branch, post_weight, residual, _ = post_norm_operands((3,), 64, 64, 0)
    assert add_post_norm(branch, post_weight, residual.astype(jnp.float32), EPS).dtype == jnp.float32
    x = add_post_norm(branch.at[1, 7].set(jnp.inf), post_weight, residual, EPS)
    np.testing.assert_array_equal(np.isnan(np.asarray(x, np.float32)), [[False] * 64, [True] * 64, [False] * 64])
    assert_same_numbers(add_post_norm(jnp.zeros_like(branch), post_weight, residual, EPS), residual)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": jnp.ones((2, 9))}, r"branch has shape \(2, 9\) and the residual \(2, 8\)"),
        ({"branch": random_partials((3,), 8, 64, 2)}, r"branch has shape \(3, 8\) and the residual \(2, 8\)"),
        ({"branch": random_partials((2,), 8, 64, 2, residual=jnp.ones((2, 8)))}, "a residual of its own"),
        ({"residual": jnp.ones((2, 8), jnp.int32)}, "dtype int32"),
        ({"post_weight": jnp.ones(4)}, r"weight has shape \(4,\)"),
        ({"weight": jnp.ones(8, jnp.bfloat16)}, "dtype bfloat16"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_post_norm_errors_quote_what_is_wrong(changes, message):
    ones = {"branch": jnp.ones((2, 8)), "residual": jnp.ones((2, 8)), "post_weight": jnp.ones(8), "weight": jnp.ones(8)}
    with pytest.raises(ValueError, match=message):
        post_norm_quantize(**{**ones, "eps": EPS, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 8)), jnp.ones(4), EPS), r"weight has shape \(4,\)"),
        ((jnp.ones((2, 8)), jnp.ones(8, jnp.bfloat16), EPS), "dtype bfloat16"),
        ((jnp.ones((2, 8)), jnp.ones(8), 0.0), "eps is 0.0"),
        ((jnp.ones((2, 8), jnp.int32), jnp.ones(8), EPS), "dtype int32"),
    ],
)
def test_errors_quote_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm_quantize(*arguments)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_quantizes_as_the_format_does(shape):
    x = random_rows(shape)
    for actual, expected in zip(sm90.quantize_rows(x), on_cpu(formats.quantize_fp8, x), strict=True):
        assert_same_numbers(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 4096, 14336])
def test_kernel_follows_the_rules_for_special_rows(width):
    x = special_rows(width)
    for actual, expected in zip(sm90.quantize_rows(x), on_cpu(formats.quantize_fp8, x), strict=True):
        assert_same_numbers(actual, expected)
    rows = sm90.rms_norm_quantize(x, weight_of(width), eps=EPS)
    expected = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), x, weight_of(width))
    np.testing.assert_allclose(formats.dequantize(rows), formats.dequantize(expected), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_normalizes_as_the_reference_does(shape):
    """The same values; the scale holds a sum, which has no order, and an approximate rsqrt (2 ulp)."""
    x, weight = random_rows(shape), weight_of(shape[-1])
    rows = sm90.rms_norm_quantize(x, weight, eps=EPS)
    expected = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), x, weight)
    assert_same_numbers(rows.values, expected.values)
    np.testing.assert_allclose(rows.scale, expected.scale, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n", "padded", "parts"), SUMS)
@pytest.mark.parametrize(
    ("config", "bias"),
    [*((config, None) for config in SUM_CONFIGS), *((SUM_CONFIGS[i], bias) for i in (0, 2, 8) for bias in BIASES[1:])],
)
def test_kernel_adds_parts_up_as_the_reference_does(rows, n, padded, parts, config, bias):
    """The sum's steps are the reference's but for fused multiply-adds: x is at most a bf16 step away."""
    total, weight = residual_sum(rows, n, padded, parts, bias=bias_of(n, bias)), weight_of(n)
    poison((*rows, n))
    quantized, x = sm90.sum_norm_quantize(total, weight, eps=EPS, config=config)
    expected = on_cpu(lambda total: total.reduce(), total).astype(np.float32)
    np.testing.assert_allclose(np.asarray(x, np.float32), expected, rtol=2**-7, atol=1e-3)
    assert np.mean(np.asarray(x, np.float32) == expected) > 0.99
    exact = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), x, weight)
    assert_same_numbers(quantized.values, exact.values)
    np.testing.assert_allclose(quantized.scale, exact.scale, rtol=2e-6)
    again, _ = sm90.sum_norm_quantize(total, weight, eps=EPS, config=config)
    assert_same_numbers(again.scale, quantized.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SUM_CONFIGS)
def test_kernel_of_a_sum_follows_the_rules_for_special_rows(config):
    special, weight = special_rows(4096), weight_of(4096)
    total = residual_sum(special.shape[:1], 4096, 4096, 8, residual=special)
    total = dataclasses.replace(total, parts=jnp.zeros_like(total.parts))
    poison(special.shape)
    rows, x = sm90.sum_norm_quantize(total, weight, eps=EPS, config=config)
    assert_same_numbers(x, special)
    expected = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), special, weight)
    np.testing.assert_allclose(formats.dequantize(rows), formats.dequantize(expected), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize(
    ("case", "config"),
    [(case, config) for case in POST_NORMS for config in (SUM_CONFIGS[::3] if case[3] else (None, Config(8)))],
)
def test_kernel_of_a_post_norm_does_as_the_reference(case, config, pre_norm):
    """A sum of squares has no order and rsqrt is approximate: few numbers of x fall to the other side of a step."""
    rows, n, padded, parts, bias = case
    branch, post_weight, residual, weight = post_norm_operands(rows, n, padded, parts, bias)
    weight = weight if pre_norm else None
    poison((*rows, n))
    quantized, x = sm90.post_norm_quantize(branch, post_weight, residual, weight, eps=EPS, config=config)
    expected = on_cpu(functools.partial(add_post_norm, eps=EPS), branch, post_weight, residual).astype(np.float32)
    np.testing.assert_allclose(np.asarray(x, np.float32), expected, rtol=2**-6, atol=5e-2)
    assert np.mean(np.asarray(x, np.float32) == expected) > 0.97
    if pre_norm:
        exact = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), x, weight)
    else:
        exact = on_cpu(formats.quantize_fp8, x)
    assert_same_numbers(quantized.values, exact.values)
    np.testing.assert_allclose(quantized.scale, exact.scale, rtol=2e-6)
    again, _ = sm90.post_norm_quantize(branch, post_weight, residual, weight, eps=EPS, config=config)
    assert_same_numbers(again.values, quantized.values)
    assert_same_numbers(again.scale, quantized.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("config", [None, Config(8)])
def test_kernel_of_a_post_norm_follows_the_rules_for_special_rows(config, pre_norm):
    """A branch's row that is not finite leaves nothing of its residual, and shows; others do not notice."""
    special, weight = special_rows(4096), weight_of(4096) if pre_norm else None
    residual = random_rows(special.shape, 5)
    rows, x = sm90.post_norm_quantize(special, weight_of(4096), residual, weight, eps=EPS, config=config)
    expected = on_cpu(functools.partial(add_post_norm, eps=EPS), special, weight_of(4096), residual)
    broken = np.isnan(np.asarray(expected, np.float32)).all(-1)
    assert broken.tolist() == [False, True, True, True, True, True, True, False, True, False]
    np.testing.assert_array_equal(np.isnan(np.asarray(x, np.float32)).all(-1), broken)
    np.testing.assert_array_equal(np.isnan(formats.dequantize(rows)).all(-1), broken)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_gives_the_same_rows(config):
    x, weight = random_rows((13, 4104)), weight_of(4104)
    if config == Config(1):
        x, weight = x[:, :4096], weight[:4096]
    for actual, expected in zip(sm90.quantize_rows(x, config=config), on_cpu(formats.quantize_fp8, x), strict=True):
        assert_same_numbers(actual, expected)
    rows = sm90.rms_norm_quantize(x, weight, eps=EPS, config=config)
    expected = on_cpu(functools.partial(rms_norm_quantize_reference, eps=EPS), x, weight)
    assert_same_numbers(rows.values, expected.values)
    np.testing.assert_allclose(rows.scale, expected.scale, rtol=2e-6)


# --- lowering for CUDA, on any machine ------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_lower_for_cuda(shape):
    x, weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    normalize = jax.jit(functools.partial(sm90.rms_norm_quantize, eps=EPS))
    for function, arguments in ((sm90.quantize_rows, (x,)), (normalize, (x, weight))):
        exported = jax.export.export(function, platforms=["cuda"])(*arguments)
        values, scale = exported.out_avals
        assert (values.shape, scale.shape) == (shape, (*shape[:-1], 1))
        assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(("rows", "n", "padded", "parts"), SUMS)
@pytest.mark.parametrize("config", [None, Config(1, 8), Config(4, 2)])
def test_kernel_of_a_sum_lowers_for_cuda(rows, n, padded, parts, config):
    bias = BIASES[parts % 3]
    total, weight = jax.eval_shape(lambda: (residual_sum(rows, n, padded, parts, bias=bias_of(n, bias)), weight_of(n)))
    normalize = jax.jit(functools.partial(sm90.sum_norm_quantize, eps=EPS, config=config))
    exported = jax.export.export(normalize, platforms=["cuda"])(total, weight)
    assert [aval.shape for aval in exported.out_avals] == [(*rows, n), (*rows, 1), (*rows, n)]
    assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize(("rows", "n", "padded", "parts", "bias"), POST_NORMS)
def test_kernel_of_a_post_norm_lowers_for_cuda(rows, n, padded, parts, bias, pre_norm, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    branch, post_weight, residual, weight = jax.eval_shape(lambda: post_norm_operands(rows, n, padded, parts, bias))
    normalize = jax.jit(functools.partial(post_norm_quantize, eps=EPS))
    operands = branch, post_weight, residual, weight if pre_norm else None
    exported = jax.export.export(normalize, platforms=["cuda"])(*operands)
    assert [aval.shape for aval in exported.out_avals] == [(*rows, n), (*rows, 1), (*rows, n)]
    assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("width", [8, 4096, 8192, 8200, 14336, 28672, MAX_WIDTH])
def test_default_configuration_is_the_smallest_that_holds_a_row(width):
    warpgroups, held = default_config(width).warpgroups, WARPGROUP * CHUNK * MAX_CHUNKS
    assert (warpgroups - 1) * held < width <= warpgroups * held


@pytest.mark.parametrize(
    ("rows", "width", "parts", "config"),
    [
        (1, 4096, 9, Config(1, 8)),
        (16, 4096, 4, Config(1, 8)),
        (17, 4096, 4, Config(2, 4)),
        (64, 4096, 4, Config(4, 2)),
        (67, 4096, 4, Config(4)),
        (1, 4096, 2, Config(1, 8)),
        (1, 4088, 2, Config(2, 4)),
        (1, 2048, 2, Config(2)),
        (1, 1152, 8, Config(2)),
        (64, 4096, 2, Config(4)),
        (1, 320, 32, Config(1)),
        (1, 16384, 2, Config(4, 8)),
        (1, 65536, 2, Config(4, 8)),
    ],
)
def test_few_rows_in_parts_are_shared_by_clusters(rows, width, parts, config):
    assert parts_config(rows, width, parts) == config


@pytest.mark.parametrize("warpgroups", [0, 9])
def test_configuration_quotes_what_is_wrong(warpgroups):
    with pytest.raises(ValueError, match=f"warpgroups is {warpgroups}"):
        Config(warpgroups)
    with pytest.raises(ValueError, match="more warpgroups"):
        sm90.quantize_rows(random_rows((2, 16384)), config=Config(1))
    with pytest.raises(ValueError, match="expected a cluster of 1"):
        sm90.quantize_rows(random_rows((2, 4096)), config=Config(1, 8))
    with pytest.raises(ValueError, match="warpgroups is 5; expected 1 to 4"):
        Config(5, 8)
    with pytest.raises(ValueError, match="cluster is 3"):
        Config(1, 3)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (jnp.ones((2, 64)), "float32"),
        (jnp.ones((2, 12), jnp.bfloat16), "12 elements"),
        (jnp.ones((2, MAX_WIDTH + 8), jnp.bfloat16), "elements"),
        (jnp.ones((0, 64), jnp.bfloat16), "empty"),
    ],
)
def test_a_named_kernel_never_falls_back(x, reason):
    with pytest.raises(NotImplementedError, match=reason):
        quantize_rows(x, implementation="mosaic_gpu")
    assert quantize_rows(x).values.shape == x.shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x_scale": None}, "not of FP8 rows"),
        ({"bias": jnp.ones(64, jnp.float16)}, "the bias has dtype float16"),
        ({"residual": None}, "no bfloat16 residual"),
    ],
)
def test_a_named_kernel_does_not_finish_other_sums(changes, reason):
    total = residual_sum((2,), 64, 64, 2, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        sum_norm_quantize(total, weight_of(64), EPS, implementation="mosaic_gpu")
    assert sum_norm_quantize(total, weight_of(64), EPS)[1].shape == (2, 64)


@pytest.mark.parametrize(
    ("branch", "residual", "reason"),
    [
        (jnp.ones((2, 64), jnp.bfloat16), jnp.ones((2, 64)), "the residual has dtype float32"),
        (jnp.ones((2, 64)), jnp.ones((2, 64), jnp.bfloat16), "x has dtype float32"),
        (random_partials((2,), 64, 64, 2, x_scale=None), jnp.ones((2, 64), jnp.bfloat16), "not of FP8 rows"),
    ],
)
def test_a_named_kernel_does_not_finish_other_branches(branch, residual, reason):
    with pytest.raises(NotImplementedError, match=reason):
        post_norm_quantize(branch, weight_of(64), residual, None, EPS, implementation="mosaic_gpu")
    assert post_norm_quantize(branch, weight_of(64), residual, None, EPS)[1].dtype == residual.dtype


def test_norm_of_an_activated_sum_is_refused():
    total = residual_sum((2,), 64, 64, 2, activation="silu_mul", residual=None)
    with pytest.raises(ValueError, match="'silu_mul'; expected 'none'"):
        sum_norm_quantize(total, weight_of(32), EPS)
