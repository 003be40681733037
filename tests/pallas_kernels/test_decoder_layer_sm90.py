"""A layer's matmuls in two kernels: who computes what, lowering for CUDA on any machine, results on a GPU."""

import dataclasses
import functools
import logging

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_layers import random_inputs, random_layer
from hypothesis import given
from hypothesis import strategies as st
from poisoned_memory import poison

from pallas_kernels import decoder_layer, dispatch
from pallas_kernels.decoder_layer import after_attention, before_attention
from pallas_kernels.matmul import matmul
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.row_quantize import quantize_rows
from pallas_kernels.sm90.chain.schedule import Link
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.split_k import SplitKPartials, reduced

GELU = {"activation": "gelu_tanh_mul"}
# name: (rows, hidden, intermediate size, channels of qkv, options of ``random_layer``). Between them: tiles in one part
# and in several, blocks without work, K that ends inside a chunk, rows longer than a load of all threads, each format,
# biases, each activation.
CASES = {
    "one-row": (1, 512, 1024, 768, {}),
    "four-rows": (4, 512, 1024, 768, {}),
    "ragged-k": (3, 1024, 1408, 1536, {}),
    "group-64": (2, 1024, 3072, 1536, {"group_size": 64}),
    "fp4": (1, 512, 1024, 768, {"format": "fp4"}),
    "nf4": (2, 512, 1024, 768, {"group_size": 64, "format": "nf4"}),
    "wide-rows": (2, 5120, 1024, 5120, {}),
    "llama3-8b": (1, 4096, 14336, 6144, {}),
    "llama2-7b": (4, 4096, 11008, 12288, {}),
    "bias": (3, 1024, 1408, 1536, {"bias": jnp.bfloat16}),
    "float32-bias": (1, 512, 1024, 768, {"bias": jnp.float32}),
    "gelu": (2, 512, 1024, 768, GELU),
    "gemma-2b": (1, 2048, 16384, 2560, GELU),
    "bias-gelu-group-64": (4, 1024, 3072, 1536, {"bias": jnp.bfloat16, "group_size": 64} | GELU),
}
# Layers that two kernels cannot do; (rows, options).
OTHERS = {
    "post": (2, {"order": "post"}),
    "sandwich": (1, {"order": "sandwich", "bias": jnp.bfloat16} | GELU),
    "sandwich-16": (16, {"order": "sandwich"} | GELU),
    "sandwich-300": (300, {"order": "sandwich"}),
    "post-128": (128, {"order": "post"}),
    "parallel": (3, {"order": "parallel", "kind": "layer"}),
    "bias-8": (8, {"bias": jnp.bfloat16}),
}


def case_of(name):
    """Attention and the residual stream, and the layer."""
    rows, *sizes, options = CASES[name] if name in CASES else (OTHERS[name][0], 1024, 3072, 1536, OTHERS[name][1])
    attention, residual = random_inputs(rows, sizes[0])
    return (quantize_rows(attention, implementation="xla"), residual), random_layer(*sizes, **options)


@functools.partial(jax.jit, static_argnames=("implementation", "chains"))
def run(inputs, layer, implementation="auto", chains=True):
    """Packed, the layer's output, and packed of the next, which has the same weights."""
    attention, residual = inputs
    with pytest.MonkeyPatch.context() as patch:
        if not chains:
            patch.setattr(decoder_layer, "unsupported", lambda *_: "separately, to compare")
        packed, x = before_attention(ResidualStream(residual), layer, implementation=implementation)
        y = after_attention(attention, x, layer, implementation=implementation)
        following, z = before_attention(y, layer, implementation=implementation)
    return reduced(packed), y.finish(), reduced(following), z.finish()


# --- who computes what ----------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 250), st.booleans())
def test_blocks_share_all_chunks_in_runs(tiles_n, tiles_k, gated):
    link = Link(64 * tiles_n, 128 * tiles_k, 1, "hidden", "silu_mul" if gated else "none")
    owner = np.arange(link.total) // link.per_block
    assert owner[-1] + 1 == link.blocks <= NUM_SMS
    of_tile = owner.reshape(tiles_n, link.chunks)
    assert link.parts == np.max(of_tile[:, -1] - of_tile[:, 0]) + 1
    if gated:
        assert link.parts == 1
    # No block has room for fewer input columns than it multiplies.
    assert link.held_chunks >= min(link.per_block, link.chunks)


def test_llama_layers_fit():
    for sizes in ((2048, 8192, 3072), (4096, 14336, 6144), (4096, 11008, 12288)):
        layer = jax.eval_shape(lambda sizes=sizes: random_layer(*sizes))
        x = ResidualStream(jax.ShapeDtypeStruct((1, sizes[0]), jnp.bfloat16))
        assert decoder_layer.unsupported(x, layer) is None


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((640, 1024, 768), {}, "a norm has 640 columns"),
        ((512, 200, 768), {}, "not whole tiles"),
        ((8192, 28672, 768), {}, "bytes of shared memory"),
        ((512, 1024, 768), {"format": "fp8"}, "a weight is FP8"),
        ((512, 1024, 768), {"scale_dtype": "bf16"}, "group scales are bfloat16"),
    ],
)
def test_what_two_kernels_cannot_do(sizes, options, reason):
    layer = jax.eval_shape(lambda: random_layer(*sizes, **options))
    message = decoder_layer.unsupported(ResidualStream(jax.ShapeDtypeStruct((1, sizes[0]), jnp.bfloat16)), layer)
    assert message is not None
    assert reason in message


# --- lowering for CUDA, on any machine ------------------------------------------------------------


def kernels_of(name, monkeypatch):
    """How many the two ops and the next layer's first launch."""
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    inputs, layer = jax.eval_shape(lambda: case_of(name))
    module = jax.export.export(run, platforms=["cuda"])(inputs, layer).mlir_module()
    return module.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("name", ["one-row", "ragged-k", "group-64", "fp4", "llama2-7b", "bias-gelu-group-64"])
def test_a_kernel_for_each_op(name, monkeypatch):
    assert kernels_of(name, monkeypatch) == 3


@pytest.mark.parametrize(
    ("name", "kernels"),
    # Four matmuls, quantized hidden rows, and one for each place with norms that differs from others.
    [("sandwich", 8), ("post", 8), ("bias-8", 7), ("sandwich-300", 8), ("parallel", 5)],
)
def test_other_layers_take_one_for_each_step(name, kernels, monkeypatch):
    assert kernels_of(name, monkeypatch) == kernels


@pytest.mark.parametrize("decoding", [True, False])
def test_a_short_prompt_takes_a_kernel_for_each_step(decoding, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    (_, residual), layer = jax.eval_shape(lambda: case_of("four-rows"))
    first = functools.partial(before_attention, decoding=decoding)
    _, x = jax.eval_shape(lambda x, layer: first(ResidualStream(x), layer), residual, layer)
    assert (x.barrier is not None) == decoding


def test_weights_of_two_formats_take_two_kernels_but_for_fp8(monkeypatch, caplog):
    """Which other kernels multiply; the log says so."""
    monkeypatch.setattr(dispatch, "compute_capability", lambda: (9, 0))
    decoder_layer._log_single_ops.cache_clear()
    (_, residual), layer = jax.eval_shape(lambda: case_of("four-rows"))
    for weight_format, chains in (("nf4", True), ("fp8", False)):
        other = jax.eval_shape(lambda weight_format=weight_format: random_layer(512, 1024, 768, format=weight_format))
        mixed = dataclasses.replace(layer, down=other.down)
        with caplog.at_level(logging.INFO):
            _, x = jax.eval_shape(lambda x, layer: before_attention(ResidualStream(x), layer), residual, mixed)
        assert (x.barrier is not None) == chains
        assert ("kernels for each op, not one for several: a weight is FP8" in caplog.text) != chains


def test_a_watched_layer_takes_the_same_kernels(monkeypatch):
    """What a tap sees is computed beside them."""
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    (attention, residual), layer = jax.eval_shape(lambda: case_of("four-rows"))
    seen = {}

    def watched(attention, residual, layer):
        _, x = before_attention(ResidualStream(residual), layer, tap=seen.__setitem__)
        y = after_attention(attention, x, layer, tap=seen.__setitem__)
        assert isinstance(y.value, SplitKPartials)
        return y.value.parts, dict(seen)

    module = jax.export.export(jax.jit(watched), platforms=["cuda"])(attention, residual, layer).mlir_module()
    assert module.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert {name: x.shape for name, x in seen.items()} == {"down_input": (4, 1, 1024)}


# --- results on a GPU -----------------------------------------------------------------------------


def relative_error(x, expected):
    x, expected = (np.asarray(array, np.float64) for array in (x, expected))
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_two_kernels_are_as_near_to_the_reference_as_separate_ones(name):
    """FP8 numbers near a rounding's middle fall either way, so nothing after the first can be equal."""
    inputs, layer = case_of(name)
    reference = run(inputs, layer, "xla")
    separate = run(inputs, layer, "mosaic_gpu", chains=False)
    poison(reference[0].shape)
    found = run(inputs, layer, "mosaic_gpu")
    for part, (chain, kernels, expected) in enumerate(zip(found, separate, reference, strict=True)):
        assert relative_error(chain, expected) < 1.25 * relative_error(kernels, expected) + 1e-3, part


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["four-rows", "bias"])
def test_the_stream_after_attention_has_no_fp8_rounding_before_it(name):
    (attention, residual), layer = case_of(name)

    @jax.jit
    def after(attention, residual, layer):
        _, x = before_attention(ResidualStream(residual), layer, implementation="mosaic_gpu")
        value = after_attention(attention, x, layer, implementation="mosaic_gpu").value
        assert isinstance(value, SplitKPartials)
        return value.residual

    o_proj = layer.o_proj
    expected = matmul(attention, o_proj.weight, bias=o_proj.bias, residual=residual, implementation="xla")
    found = after(attention, residual, layer).reshape(expected.shape)
    assert relative_error(found, expected) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", OTHERS)
def test_kernels_of_other_layers_are_near_to_the_reference(name):
    """Two FP8 roundings that fall either way here and there: by a sixteenth of a number; 0.0305 at most on an H200."""
    inputs, layer = case_of(name)
    reference = run(inputs, layer, "xla")
    poison(reference[0].shape)
    for x, expected in zip(run(inputs, layer), reference, strict=True):
        assert relative_error(x, expected) < 0.04


@pytest.mark.gpu
def test_two_kernels_repeat_exactly():
    """A race between blocks would show as numbers that change; memory is poisoned in between."""
    inputs, layer = case_of("llama3-8b")
    first = run(inputs, layer)
    for _ in range(20):
        poisoned = jnp.full((1 << 24,), jnp.nan)
        jax.block_until_ready(poisoned)
        del poisoned
        for x, y in zip(first, run(inputs, layer), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bias": jnp.bfloat16} | GELU])
def test_inf_in_the_stream_shows(options):
    """A row with Inf becomes NaN, as in ``sum_norm_quantize``; its neighbour does not notice."""
    attention, residual = random_inputs(2, 512)
    attention, layer = quantize_rows(attention, implementation="xla"), random_layer(512, 1024, 768, **options)
    found = run((attention, residual.at[0, 0, 7].set(jnp.inf)), layer)
    expected = run((attention, residual), layer)
    for x, y in zip(found, expected, strict=True):
        assert not np.isfinite(np.asarray(x[0], np.float32)).all()
        np.testing.assert_array_equal(np.asarray(x[1], np.float32), np.asarray(y[1], np.float32))
