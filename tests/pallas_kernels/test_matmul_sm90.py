"""The Hopper matmul: configurations, lowering for CUDA on any machine, results on a GPU.

Pallas' GPU interpret mode cannot run this kernel: its weights become WGMMA's register operand in
inlined PTX, for which a stand-in would be another kernel.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul_epilogue import width_out
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.common.hardware import SMEM_BYTES
from pallas_kernels.sm90.matmul import config as matmul_config
from pallas_kernels.sm90.matmul import launch
from pallas_kernels.sm90.matmul.config import Config, DecodeConfig, choose, heuristic, smem_bytes
from pallas_kernels.split_k import reduced

PREFILL = Config(256, multicast=2)
SILU, GELU, BOTH = {"activation": "silu_mul"}, {"activation": "gelu_tanh_mul"}, {"bias": True, "residual": True}
GATES = {
    "silu_mul": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh_mul": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}

# name: (m, n, k, options of _operands, config). Between them: every epilogue, both scale modes and
# group sizes, both types of x, ragged M, N and K, one and several tiles, split K, promotion.
CASES: dict[str, tuple[int, int, int, dict, Config]] = {
    "prefill": (512, 512, 1024, {}, PREFILL),
    "no-multicast": (300, 512, 1024, {}, Config(256)),
    "five-stages": (501, 512, 640, {}, Config(256, stages=5, multicast=2, store_m=32)),
    "many-tiles": (2304, 8192, 256, {}, PREFILL),
    "ragged": (501, 1000, 1100, {}, PREFILL),
    "tile-96": (300, 512, 1152, {}, Config(96, multicast=2, store_m=32)),
    "one-step": (70, 512, 128, {}, Config(128)),
    "group-64": (300, 512, 1024, {"group_size": 64}, PREFILL),
    "bias-residual": (300, 512, 1024, {"bias": True, "residual": True}, PREFILL),
    "float32-bias": (300, 512, 1024, {"bias": jnp.float32}, PREFILL),
    "silu": (300, 512, 1024, SILU, PREFILL),
    "silu-bias-residual": (133, 528, 1024, SILU | BOTH, PREFILL),
    "gelu": (300, 512, 1024, GELU, PREFILL),
    "gelu-bias-residual": (133, 528, 1024, GELU | BOTH, PREFILL),
    "odd-n-residual": (37, 100, 256, {"residual": True}, Config(64)),
    "promote-4": (300, 512, 2048, {}, Config(128, stages=6, promote=4)),
    "promote-3-group-64": (300, 512, 1280, {"group_size": 64}, Config(128, stages=6, promote=3)),
    "bf16-scale": (300, 512, 1152, {"scale_dtype": "bf16"}, Config(128, stages=6, multicast=2)),
    "bf16-scale-144": (300, 512, 1152, {"scale_dtype": "bf16"}, Config(144, multicast=2, store_m=48)),
    "bf16-scale-group-64": (100, 512, 640, {"scale_dtype": "bf16", "group_size": 64}, Config(64)),
    "bf16-scale-silu": (40, 512, 1024, {"scale_dtype": "bf16"} | SILU, Config(64)),
    "bf16-x": (300, 512, 1024, {"x_dtype": jnp.bfloat16}, Config(128, multicast=2)),
    "bf16-x-group-64": (100, 512, 640, {"x_dtype": jnp.bfloat16, "group_size": 64}, Config(128)),
    "bf16-x-bf16-scale": (100, 512, 640, {"x_dtype": jnp.bfloat16, "scale_dtype": "bf16"}, Config(64)),
    "bf16-x-few": (3, 512, 1024, {"x_dtype": jnp.bfloat16, "bias": True}, Config(8, stages=3, k_tiles=2, store_m=8)),
    "four-warpgroups": (13, 1088, 1024, {}, Config(16, warpgroups=4, stages=2, k_tiles=4, store_m=16)),
    "sixty-one": (61, 1088, 1024, {"residual": True}, Config(64, warpgroups=4, stages=5, store_m=16)),
    "batched-group-64": (13, 512, 2048, {"group_size": 64}, Config(16, stages=2, k_tiles=4)),
    "fp4": (300, 512, 1024, {"format": "fp4"}, PREFILL),
    "nf4-few": (13, 512, 2048, {"format": "nf4", "group_size": 64}, DecodeConfig(16, k_warpgroups=2)),
    "fp4-bf16-scale": (30, 512, 1152, {"format": "fp4", "scale_dtype": "bf16"}, DecodeConfig(32, k_warpgroups=2)),
    "one-token": (1, 1000, 1024, {}, DecodeConfig(8)),
    "decode-stages": (13, 1088, 4096, {"bias": True}, DecodeConfig(16, depth=5, stages=3)),
    "decode-rest": (13, 320, 1280, {"residual": True}, DecodeConfig(16, warpgroups=3, depth=3)),
    "decode-silu": (61, 1088, 2048, SILU | {"residual": True}, DecodeConfig(64, depth=3)),
    "decode-gelu": (13, 1088, 2048, GELU | {"bias": True}, DecodeConfig(16, depth=3)),
    "decode-40": (37, 576, 1024, {"residual": True}, DecodeConfig(40, depth=3)),
    "decode-odd-n": (37, 100, 256, {"residual": True}, DecodeConfig(40)),
    "decode-group-64": (13, 512, 2048, {"group_size": 64}, DecodeConfig(16, k_warpgroups=2)),
    "decode-bf16-scale": (30, 512, 2176, {"scale_dtype": "bf16"} | SILU, DecodeConfig(32, k_warpgroups=2)),
    "decode-bf16-scale-group-64": (
        5,
        512,
        1152,
        {"scale_dtype": "bf16", "group_size": 64},
        DecodeConfig(8, split_k=2),
    ),
    "decode-bf16-x": (3, 512, 1024, {"x_dtype": jnp.bfloat16, "bias": True}, DecodeConfig(8, k_warpgroups=4)),
    "decode-bf16-x-bf16-scale": (
        12,
        512,
        1280,
        {"x_dtype": jnp.bfloat16, "scale_dtype": "bf16", "group_size": 64},
        DecodeConfig(16, k_warpgroups=2, depth=2),
    ),
    "k-warpgroups-64": (61, 512, 2048, {}, DecodeConfig(64, k_warpgroups=4, depth=2)),
    "k-warpgroups-8": (16, 512, 4096, {"residual": True}, DecodeConfig(16, 8, 8, depth=4)),
    "decode-two-rows": (23, 320, 1024, {"bias": True}, DecodeConfig(16, k_warpgroups=2)),
    "split-two-rows": (23, 320, 1024, {"residual": True}, DecodeConfig(16, k_warpgroups=2, split_k=2)),
    "prefill-split": (300, 512, 1024, {"residual": True}, Config(256, split_k=2, multicast=2)),
    "prefill-split-uneven": (70, 1000, 1408, {"group_size": 64}, Config(128, split_k=8, multicast=2)),
    "prefill-split-silu": (133, 528, 1024, SILU | BOTH, Config(64, split_k=3)),
    "prefill-split-bf16-scale": (100, 512, 1152, {"scale_dtype": "bf16"}, Config(128, stages=6, split_k=2)),
    "prefill-split-bf16-x": (100, 512, 1024, {"x_dtype": jnp.bfloat16}, Config(128, split_k=2)),
    "prefill-split-batched": (13, 512, 2048, {}, Config(16, warpgroups=4, split_k=2, stages=2, k_tiles=4, store_m=16)),
    "split-7": (16, 512, 14336, {}, DecodeConfig(16, k_warpgroups=2, split_k=7)),
    "split-uneven": (5, 512, 11008, {}, DecodeConfig(8, k_warpgroups=4, split_k=2, depth=16)),
    "split-past-the-end": (5, 100, 640, {}, DecodeConfig(8, k_warpgroups=4, split_k=4)),
    "split-silu": (30, 512, 4096, SILU, DecodeConfig(32, warpgroups=2, k_warpgroups=2, split_k=3)),
    "split-gelu": (30, 512, 4096, GELU, DecodeConfig(32, split_k=3)),
    "split-bias-residual": (30, 200, 4096, {"bias": True, "residual": True}, DecodeConfig(32, split_k=8)),
}


def _operands(
    m,
    n,
    k,
    *,
    format="int4",
    group_size=128,
    scale_dtype="e4m3",
    x_dtype=formats.E4M3,
    bias=None,
    residual=False,
    activation="none",
    seed=0,
):
    keys = jax.random.split(jax.random.key(seed), 4)
    weight = QuantizedTensor.random(
        keys[0], (n, k), format=format, group_size=group_size, scale_dtype=scale_dtype, std=0.05
    )
    x = jax.random.normal(keys[1], (m, k))
    x = formats.quantize_fp8(x) if x_dtype == formats.E4M3 else x.astype(x_dtype)
    options = {}
    if bias:
        options["bias"] = jax.random.normal(keys[2], (n,)).astype(jnp.bfloat16 if bias is True else bias)
    if residual:
        shape = m, width_out(n, activation)
        options["residual"] = (3 * jax.random.normal(keys[3], shape)).astype(jnp.bfloat16)
    return x, weight, options


def _kernel(x, weight, config, **options):
    values, scale = x if isinstance(x, ScaledArray) else (x, None)
    pad = weight.values.shape[1] * layouts.TILE_K - values.shape[1]
    y = launch.matmul(
        jnp.pad(values, ((0, 0), (0, pad))),
        weight.values,
        weight.group_scale,
        weight.channel_scale,
        n=weight.shape[0],
        config=config,
        x_scale=None if scale is None else scale[:, 0],
        codebook=weight.format,
        **options,
    )
    return reduced(y)


def _reference(x, weight, *, bias=None, residual=None, activation="none"):
    """float64."""
    values, scale = x if isinstance(x, ScaledArray) else (x, None)
    y = np.asarray(values.astype(jnp.float32), np.float64) @ np.asarray(weight.unscaled(), np.float64).T
    y *= np.asarray(weight.channel_scale[: weight.shape[0]], np.float64)
    if scale is not None:
        y *= np.asarray(scale, np.float64)
    if bias is not None:
        y += np.asarray(bias, np.float64)
    if activation != "none":
        gate, up = (y.reshape(len(y), -1, 2, 8)[:, :, i].reshape(len(y), -1) for i in range(2))
        y = GATES[activation](gate) * up
    if residual is not None:
        y += np.asarray(residual, np.float64)
    return y


def _poison(shape):
    """Leave NaN in memory that the allocator is likely to hand out next."""
    jax.block_until_ready([jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(4)])


def _error(y, expected):
    y = np.asarray(y, np.float64)
    assert y.shape == expected.shape
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


# --- configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_m": 12}, "tile_m is 12"),
        ({"tile_m": 264}, "tile_m is 264"),
        ({"tile_m": 96}, "multiple of store_m"),
        ({"tile_m": 64, "store_m": 20}, "store_m is 20"),
        ({"tile_m": 64, "warpgroups": 3}, "warpgroups is 3"),
        ({"tile_m": 128, "warpgroups": 4}, "registers for at most 64"),
        ({"tile_m": 64, "stages": 1}, "stages is 1"),
        ({"tile_m": 64, "k_tiles": 3}, "k_tiles is 3"),
        ({"tile_m": 64, "k_tiles": 2, "promote": 1}, "1 with promotion"),
        ({"tile_m": 64, "multicast": 4}, "multicast is 4"),
        ({"tile_m": 256, "promote": 1}, "second sum"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_m": 72}, "tile_m is 72"),
        ({"tile_m": 20}, "tile_m is 20"),
        ({"tile_m": 8, "warpgroups": 9}, "1 to 8 warpgroups"),
        ({"tile_m": 8, "k_warpgroups": 3}, "a multiple of k_warpgroups"),
        ({"tile_m": 8, "split_k": 9}, "split_k is 9"),
        ({"tile_m": 8, "stages": 1}, "2 to 32 stages"),
        ({"tile_m": 8, "depth": 0}, "depth of at least 1"),
    ],
)
def test_a_decode_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**fields)


@pytest.mark.parametrize(
    ("values", "scale_in_table", "groups"), list(itertools.product(("e4m3", "bf16"), (True, False), (1, 2)))
)
def test_the_heuristic_fits_every_shape(values, scale_in_table, groups):
    for m, n, k, may_split in itertools.product(
        (1, 8, 9, 17, 33, 64, 65, 128, 129, 300, 4096), (64, 320, 4096, 57344), (128, 384, 4096, 28672), (False, True)
    ):
        config = heuristic(m, n, k, values, scale_in_table, groups, may_split=may_split)
        assert m <= 64 or may_split or config.split_k == 1
        if not scale_in_table and isinstance(config, Config):
            config = dataclasses.replace(config, promote=1)
        assert smem_bytes(config, k, values) <= SMEM_BYTES
        assert m > 64 or m <= config.tile_m


def test_tuned_configs_fit_and_serve_their_shapes(monkeypatch):
    monkeypatch.setattr(matmul_config, "_device_kind", lambda: "NVIDIA H200")
    tuned = matmul_config._tuned("NVIDIA H200")
    assert tuned
    for shape, by_tokens in tuned.items():
        n, k = map(int, shape.split("x"))
        for m, config in by_tokens.items():
            assert smem_bytes(config, k, "e4m3") <= SMEM_BYTES
            assert choose(m, n, k, "e4m3", True, 1) == config
        largest = max(by_tokens)
        expected = by_tokens[largest] if largest > 64 else heuristic(1 << 20, n, k, "e4m3", True, 1)
        assert choose(1 << 20, n, k, "e4m3", True, 1) == expected
        assert choose(100, n, k, "e4m3", True, 1) == heuristic(100, n, k, "e4m3", True, 1)
        assert choose(4096, n, k, "bf16", True, 1) == heuristic(4096, n, k, "bf16", True, 1)


# The fastest of what ``tune_matmul.py`` timed on an H200, with the norm that adds up the parts.
@pytest.mark.parametrize(
    ("m", "n", "k", "tile_m", "split_k"),
    [
        (128, 6144, 4096, 128, 2),
        (256, 6144, 4096, 128, 1),
        (512, 6144, 4096, 256, 1),
        (128, 4096, 4096, 128, 4),
        (256, 4096, 4096, 128, 2),
        (512, 4096, 4096, 128, 1),
        (128, 4096, 14336, 128, 4),
        (256, 4096, 14336, 256, 4),
        (512, 4096, 14336, 256, 2),
        (256, 28672, 4096, 256, 1),
    ],
)
def test_the_rule_finds_what_was_fastest(m, n, k, tile_m, split_k):
    config = heuristic(m, n, k, "e4m3", True, 1, may_split=True)
    assert (config.tile_m, config.split_k) == (tile_m, split_k)


@pytest.mark.parametrize("config", [Config(256, store_m=32), DecodeConfig(16, split_k=3)])
def test_configs_survive_json(config):
    assert matmul_config.from_json(json.loads(json.dumps(matmul_config.to_json(config)))) == config


def test_an_unknown_device_has_no_tuned_configs():
    assert matmul_config._tuned("Some GPU") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_dtype": jnp.float32}, "out_dtype is float32"),
        ({"residual": jnp.zeros((2, 64), jnp.float32)}, "residual has dtype float32"),
        ({"x": jnp.zeros((2, 128), jnp.float16)}, "x has dtype float16"),
        ({"x": jnp.zeros((0, 128), jnp.bfloat16)}, "x or the weight is empty"),
        ({"bias": jnp.zeros((64,), jnp.float16)}, "the bias has dtype float16"),
        (
            {"x": ScaledArray(jnp.zeros((2, 128), formats.E4M3), jnp.ones((2, 1), jnp.bfloat16))},
            "the scales of x are bfloat16",
        ),
        ({"weight": QuantizedTensor.random(jax.random.key(0), (64, 128), format="fp8")}, "the weight is FP8"),
        (
            {"weight": QuantizedTensor.random(jax.random.key(0), (64, 128), format="nf4", scale_dtype="bf16")},
            "nf4's magnitudes are not",
        ),
    ],
)
def test_what_the_kernel_cannot_run_is_named(change, message):
    arguments = {"x": jnp.zeros((2, 128), jnp.bfloat16), "weight": QuantizedTensor.random(jax.random.key(0), (64, 128))}
    with pytest.raises(NotImplementedError, match=message):
        matmul(**{**arguments, **change}, implementation="mosaic_gpu")


# --- lowering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    m, n, k, options, config = CASES[name]
    x, weight, rest = jax.eval_shape(lambda: _operands(m, n, k, **options))
    activation = options.get("activation", "none")
    function = jax.jit(lambda x, w, rest: _kernel(x, w, config, **rest, activation=activation))
    exported = jax.export.export(function, platforms=["cuda"])(x, weight, rest)
    assert "mosaic_gpu" in exported.mlir_module()
    assert exported.out_avals[0].shape == (m, width_out(n, activation))


# --- results ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name):
    m, n, k, options, config = CASES[name]
    x, weight, rest = _operands(m, n, k, **options, seed=len(name))
    activation = options.get("activation", "none")
    expected = _reference(x, weight, **rest, activation=activation)
    function = jax.jit(lambda x, w, rest: _kernel(x, w, config, **rest, activation=activation))
    _poison(expected.shape)
    y = function(x, weight, rest)
    # Rounding to bf16 alone is 1.65e-3; the tensor cores' sum over K adds up to 1.1e-3 to its square.
    assert _error(y, expected) < 2.5e-3
    np.testing.assert_array_equal(np.asarray(y), np.asarray(function(x, weight, rest)))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 16, 33, 64, 65, 200, 1000])
@pytest.mark.parametrize("shape", [(4096, 4096), (320, 384)])
def test_the_op_picks_a_working_config(m, shape):
    x, weight, _ = _operands(m, *shape)
    y = jax.jit(lambda x, w: matmul(x, w, implementation="mosaic_gpu"))(x, weight)
    assert _error(y, _reference(x, weight)) < 2.5e-3


@pytest.mark.gpu
def test_leading_dimensions_are_rows():
    x, weight, _ = _operands(6, 256, 256)
    stacked = ScaledArray(x.values.reshape(2, 3, -1), x.scale.reshape(2, 3, 1))
    y = matmul(stacked, weight, implementation="mosaic_gpu")
    assert y.shape == (2, 3, 256)
    assert _error(y.reshape(6, -1), _reference(x, weight)) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(64), Config(16, stages=2, k_tiles=4), DecodeConfig(16)])
@pytest.mark.parametrize("sigma", [2.0**-9, 3 * 2.0**-9, 2.0**-6, 1.125, 64.0, 448.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scales_and_codes(config, sigma, sign):
    n, k, m = 128, 512, 16
    codes = jnp.full((n, k), 7 * sign, jnp.int8).at[:, ::3].set((jnp.arange(n)[:, None] % 8 * sign).astype(jnp.int8))
    scale = jnp.full((n, k // 128), sigma, formats.E4M3)
    weight = QuantizedTensor.from_codes(formats.WeightCodes(codes, scale, jnp.ones(n)))
    x, _, _ = _operands(m, n, k)
    assert _error(jax.jit(lambda x, w: _kernel(x, w, config))(x, weight), _reference(x, weight)) < 2.5e-3


@pytest.mark.gpu
def test_nan_stays_in_its_row():
    x, weight, _ = _operands(16, 256, 256)
    x = dataclasses.replace(x, values=x.values.at[3, 7].set(jnp.nan))
    y = np.asarray(matmul(x, weight, implementation="mosaic_gpu"), np.float32)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.gpu
def test_promotion_removes_the_error_of_the_long_sum():
    """The tensor cores' FP8 sum drops low bits; of positive terms over a long K the loss has a sign."""
    x, weight, _ = _operands(64, 256, 14336)
    x = dataclasses.replace(x, values=jnp.abs(x.values))
    weight = dataclasses.replace(weight, values=weight.values & jnp.uint32(0x77777777))
    expected = _reference(x, weight)
    bias = {}
    for promote in (0, 4, 1):
        y = np.asarray(jax.jit(lambda x, w, p=promote: _kernel(x, w, Config(64, promote=p)))(x, weight), np.float64)
        bias[promote] = abs(np.mean(y - expected)) / np.mean(expected)
    assert bias[4] < bias[0] / 2
    assert bias[1] < 1e-3
