"""A layer's matmuls in one kernel: who computes what, lowering for CUDA on any machine, results on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import dispatch, matmul_chain
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import deferred_matmul, matmul
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.row_quantize import quantize_rows, rms_norm_quantize, sum_norm_quantize
from pallas_kernels.sm90.chain.schedule import Link
from pallas_kernels.sm90.hardware import NUM_SMS
from pallas_kernels.split_sum import SplitSum, finished

EPS = 1e-5
# name: (rows, hidden, intermediate size, channels of qkv, group size, format). Between them: tiles in one part and in
# several, blocks without work, K that ends inside a chunk, rows longer than a load of all threads, each format.
CASES = {
    "one-row": (1, 512, 1024, 768, 128, "int4"),
    "four-rows": (4, 512, 1024, 768, 128, "int4"),
    "ragged-k": (3, 1024, 1408, 1536, 128, "int4"),
    "group-64": (2, 1024, 3072, 1536, 64, "int4"),
    "fp4": (1, 512, 1024, 768, 128, "fp4"),
    "nf4": (2, 512, 1024, 768, 64, "nf4"),
    "wide-rows": (2, 5120, 1024, 5120, 128, "int4"),
    "llama3-8b": (1, 4096, 14336, 6144, 128, "int4"),
    "llama2-7b": (4, 4096, 11008, 12288, 128, "int4"),
}


def weights_of(hidden, intermediate, packed, group_size, format):
    """qkv, o, gate_up, down."""
    shapes = (packed, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)
    make = functools.partial(QuantizedTensor.random, format=format, group_size=group_size, std=0.03)
    return tuple(make(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def inputs_of(rows, hidden):
    """Attention in FP8, the residual, and two norms' weights."""
    # Not a key of `weights_of`: a row of a weight would be the input itself.
    keys = jax.random.split(jax.random.key(100 + rows), 4)
    attention = jax.random.normal(keys[0], (rows, 1, hidden)).astype(jnp.bfloat16)
    residual = (2 * jax.random.normal(keys[1], (rows, 1, hidden))).astype(jnp.bfloat16)
    norms = (1 + 0.1 * jax.random.normal(key, (hidden,)) for key in keys[2:])
    return quantize_rows(attention, implementation="xla"), residual, *norms


@jax.jit
def in_chains(inputs, weights):
    """norm_matmul of the residual, output_mlp, norm_matmul of its parts: everything that they return, added up."""
    (attention, residual, first, second), (qkv, o_proj, gate_up, down) = inputs, weights
    packed, x, barrier = matmul_chain.norm_matmul(residual, first, qkv, EPS)
    y = matmul_chain.output_mlp(attention, x, o_proj, second, gate_up, down, EPS, barrier)
    following, z, _ = matmul_chain.norm_matmul(y, first, qkv, EPS)
    assert y.residual is not None
    return packed.finish(), y.residual.reshape(residual.shape), y.finish(), z, following.finish()


@functools.partial(jax.jit, static_argnames="implementation")
def one_by_one(inputs, weights, implementation):
    """The same by an op for each step."""
    (attention, residual, first, second), (qkv, o_proj, gate_up, down) = inputs, weights

    def norm(x, weight):
        if isinstance(x, SplitSum):
            return sum_norm_quantize(x, weight, EPS, implementation=implementation)
        return rms_norm_quantize(x, weight, EPS, implementation=implementation), x

    packed = matmul(norm(residual, first)[0], qkv, implementation=implementation)
    x = deferred_matmul(attention, o_proj, residual=residual, implementation=implementation)
    rows, x = norm(x, second)
    hidden = matmul(rows, gate_up, activation="silu_mul", implementation=implementation)
    hidden = quantize_rows(hidden, implementation=implementation)
    y = finished(deferred_matmul(hidden, down, residual=x, implementation=implementation))
    following = matmul(norm(y, first)[0], qkv, implementation=implementation)
    return packed, x, y, y, following


# --- who computes what ----------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 250), st.booleans())
def test_blocks_share_all_chunks_in_runs(tiles_n, tiles_k, silu_mul):
    link = Link(64 * tiles_n, 128 * tiles_k, 1, "hidden", silu_mul)
    owner = np.arange(link.total) // link.per_block
    assert owner[-1] + 1 == link.blocks <= NUM_SMS
    of_tile = owner.reshape(tiles_n, link.chunks)
    assert link.parts == np.max(of_tile[:, -1] - of_tile[:, 0]) + 1
    if silu_mul:
        assert link.parts == 1
    # No block has room for fewer input columns than it multiplies.
    assert link.held_chunks >= min(link.per_block, link.chunks)


def test_llama_layers_fit():
    for hidden, intermediate, packed in ((2048, 8192, 3072), (4096, 14336, 6144), (4096, 11008, 12288)):
        shapes = (packed, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)
        weights = [jax.eval_shape(lambda s=s: QuantizedTensor.random(jax.random.key(0), s)) for s in shapes]
        assert matmul_chain.unsupported(1, *weights) is None


@pytest.mark.parametrize(
    ("rows", "changes", "reason"),
    [
        (5, {}, "5 rows, not 1 to 4"),
        (1, {"hidden": 640}, "a norm has 640 columns"),
        (1, {"intermediate": 200}, "not whole tiles"),
        (1, {"hidden": 8192, "intermediate": 28672}, "bytes of shared memory"),
        (1, {"format": "fp8"}, "a weight is FP8"),
        (1, {"scale_dtype": "bf16"}, "group scales are bfloat16"),
    ],
)
def test_what_a_chain_cannot_run(rows, changes, reason):
    sizes = {"hidden": 512, "intermediate": 1024} | {
        k: v for k, v in changes.items() if k in ("hidden", "intermediate")
    }
    options = {k: v for k, v in changes.items() if k not in sizes}
    hidden, intermediate = sizes["hidden"], sizes["intermediate"]
    shapes = (768, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)
    weights = [jax.eval_shape(lambda s=s: QuantizedTensor.random(jax.random.key(0), s, **options)) for s in shapes]
    message = matmul_chain.unsupported(rows, *weights)
    assert message is not None
    assert reason in message
    assert not matmul_chain.runs(rows, *weights)


def test_errors_quote_what_is_wrong():
    attention, residual, first, second = inputs_of(1, 512)
    qkv, o_proj, _, down = weights_of(*CASES["one-row"][1:])
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 512\), the norm \(7,\)"):
        matmul_chain.norm_matmul(residual, first[:7], qkv, EPS)
    with pytest.raises(ValueError, match=r"\(768, 512\), .* expected \[\(512, 512\), \(2048, 512\)"):
        matmul_chain.output_mlp(attention, residual, o_proj, second, qkv, down, EPS, jnp.zeros((1,), jnp.int32))
    with pytest.raises(NotImplementedError, match="5 rows, not 1 to 4"):
        matmul_chain.norm_matmul(jnp.tile(residual, (5, 1, 1)), first, qkv, EPS)


# --- lowering for CUDA, on any machine ------------------------------------------------------------


@pytest.mark.parametrize("name", ["one-row", "ragged-k", "group-64", "fp4", "llama2-7b"])
def test_chains_lower_for_cuda(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    rows, hidden, *rest = CASES[name]
    inputs, weights = jax.eval_shape(lambda: (inputs_of(rows, hidden), weights_of(hidden, *rest)))
    assert matmul_chain.runs(rows, *weights)
    module = jax.export.export(in_chains, platforms=["cuda"])(inputs, weights).mlir_module()
    assert module.count("stablehlo.custom_call @mosaic_gpu") == 3


# --- results on a GPU -----------------------------------------------------------------------------


def relative_error(x, expected):
    x, expected = (np.asarray(array, np.float64) for array in (x, expected))
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_chains_are_as_near_to_the_reference_as_separate_kernels(name):
    """FP8 numbers near a rounding's middle fall either way, so nothing after the first can be equal."""
    rows, hidden, *rest = CASES[name]
    inputs, weights = inputs_of(rows, hidden), weights_of(hidden, *rest)
    reference = one_by_one(inputs, weights, "xla")
    separate = one_by_one(inputs, weights, "mosaic_gpu")
    found = in_chains(inputs, weights)
    for part, (chain, kernels, expected) in enumerate(zip(found, separate, reference, strict=True)):
        assert relative_error(chain, expected) < 1.25 * relative_error(kernels, expected) + 1e-3, part
    # What the stream after attention is has no FP8 rounding before it.
    assert relative_error(found[1], reference[1]) < 2e-3


@pytest.mark.gpu
def test_chains_repeat_exactly():
    """A race between blocks would show as numbers that change; memory is poisoned in between."""
    rows, hidden, *rest = CASES["llama3-8b"]
    inputs, weights = inputs_of(rows, hidden), weights_of(hidden, *rest)
    first = in_chains(inputs, weights)
    for _ in range(20):
        poison = jnp.full((1 << 24,), jnp.nan)
        jax.block_until_ready(poison)
        del poison
        for x, y in zip(first, in_chains(inputs, weights), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.gpu
def test_inf_in_the_stream_shows():
    """A row with Inf becomes NaN, as in ``sum_norm_quantize``; its neighbour does not notice."""
    inputs, weights = inputs_of(2, 512), weights_of(*CASES["one-row"][1:])
    attention, residual, first, second = inputs
    assert isinstance(attention, ScaledArray)
    found = in_chains((attention, residual.at[0, 0, 7].set(jnp.inf), first, second), weights)
    expected = in_chains(inputs, weights)
    for x, y in zip(found, expected, strict=True):
        assert not np.isfinite(np.asarray(x[0], np.float32)).all()
        np.testing.assert_array_equal(np.asarray(x[1], np.float32), np.asarray(y[1], np.float32))
