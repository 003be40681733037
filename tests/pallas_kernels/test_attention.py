"""The attention ops' reference against float64 numpy, one query at a time."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import prefill_attention

STATIC = ("scale", "causal", "window", "softcap", "out_dtype", "implementation")
prefill = jax.jit(prefill_attention, static_argnames=STATIC)
decode = jax.jit(decode_attention, static_argnames=("scale", "window", "softcap", "out_dtype", "implementation"))
H = 16
SCALE = H**-0.5


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(kv_format="none", *, batch=3, queries=5, heads=4, kv_heads=2, slots=9, fp8_query=False):
    """Query [B, T, heads, H], key and value [B, kv_heads, S, H] in cache format."""
    query = jnp.asarray(normal(0, (batch, queries, heads, H)))
    key, value = (jnp.asarray(normal(seed, (batch, kv_heads, slots, H))) for seed in (1, 2))
    rows = formats.quantize_fp8(query) if fp8_query else ScaledArray(query, None, "none")
    return rows, *(formats.quantize_kv(x, kv_format) for x in (key, value))


def brute_force(query, key, value, start, lengths, *, causal=True, window=None, softcap=None, sinks=None):
    """softmax over the visible slots of each query in float64; zeros if it sees none."""
    q, k, v = (np.asarray(formats.dequantize(x), np.float64) for x in (query, key, value))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        position = start[b] + t
        slots = [
            s
            for s in range(min(k.shape[2], lengths[b]))
            if not (causal and s > position) and not (window is not None and s <= position - window)
        ]
        if slots:
            scores = k[b, h // group, slots] @ q[b, t, h] * SCALE
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            sink = -np.inf if sinks is None else float(sinks[h])
            row_max = max(scores.max(), sink)
            weights = np.exp(scores - row_max)
            out[b, t, h] = weights / (weights.sum() + np.exp(sink - row_max)) @ v[b, h // group, slots]
    return out


START, LENGTHS = np.int32([0, 2, 4]), np.int32([5, 4, 9])


def run(attention, q, k, v, start=START, lengths=LENGTHS, **options):
    options |= {"query_start": start, "kv_lengths": lengths, "scale": SCALE}
    return np.asarray(attention(q, k, v, out_dtype=jnp.float32, implementation="xla", **options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masks_groups_and_chunks(kv_heads, window, causal):
    """Ragged lengths; chunks that start at 0, 2 and 4; MQA, GQA and MHA."""
    q, k, v = operands(kv_heads=kv_heads)
    out = run(prefill, q, k, v, causal=causal, window=window)
    expected = brute_force(q, k, v, START, LENGTHS, causal=causal, window=window)
    # float32 scores of magnitude ~5 and sums of 16 products.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("attention", [prefill, decode], ids=["prefill", "decode"])
@pytest.mark.parametrize("softcap", [None, 0.5, 5.0])
@pytest.mark.parametrize("sinks", [None, (-200.0, 0.0, 3.0, 200.0)])
def test_soft_caps_and_sinks(sinks, softcap, attention):
    """Scores of some 50, far beyond the cap; sinks that take none, some and all of the weight."""
    q, k, v = operands()
    q = dataclasses.replace(q, values=q.values * 20)
    sinks = None if sinks is None else np.float32(sinks)
    options = {"window": 4, "softcap": softcap, "sinks": sinks}
    expected = brute_force(q, k, v, START, LENGTHS, **options)
    # Scores of 50 in float32: 4e-6.
    np.testing.assert_allclose(run(attention, q, k, v, **options), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sink", [-np.inf, 1e4])
def test_the_farthest_sinks_leave_all_and_nothing(sink):
    q, k, v = operands("int4", fp8_query=True)
    out = run(prefill, q, k, v, sinks=jnp.full(4, sink))
    np.testing.assert_array_equal(out, run(prefill, q, k, v) if sink < 0 else np.zeros_like(out))


def test_queries_that_see_nothing_but_a_sink_give_zeros():
    q, k, v = operands()
    out = run(prefill, q, k, v, np.int32([0, 0, 6]), np.int32([0, 3, 2]), window=2, causal=False, sinks=jnp.ones(4))
    assert not out[0].any()
    assert out[1, :4].all()
    assert not out[2].any()


def test_whole_prompts_start_at_zero():
    """In a cache of their own, and in one that is longer and holds more, which a causal prompt does not see."""
    q, k, v = operands()
    start = np.zeros(3, np.int32)
    expected = brute_force(q, k, v, start, LENGTHS)
    np.testing.assert_allclose(run(prefill_attention, q, k, v, None), expected, rtol=1e-5, atol=2e-6)
    own = jax.tree.map(lambda x: x[:, :, :5], (k, v))
    np.testing.assert_allclose(run(prefill_attention, q, *own, None), expected, rtol=1e-5, atol=2e-6)
    all_seen = brute_force(q, k, v, start, LENGTHS, causal=False)
    np.testing.assert_allclose(run(prefill_attention, q, k, v, None, causal=False), all_seen, rtol=1e-5, atol=2e-6)


def test_long_prompts_are_scored_a_few_queries_at_a_time(monkeypatch):
    """Five queries in chunks of two (the last one padded) are what they are in one piece."""
    q, k, v = operands("int4", fp8_query=True)
    whole = run(prefill_attention, q, k, v, window=3)
    monkeypatch.setattr(sys.modules[prefill_attention.__module__], "QUERIES_AT_ONCE", 2)
    np.testing.assert_allclose(run(prefill_attention, q, k, v, window=3), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_decode_reads_every_cache_format(kv_format):
    """Plain queries: the only error is float32's."""
    q, k, v = operands(kv_format, queries=1)
    start = LENGTHS - 1
    out = run(decode, q, k, v, start)
    np.testing.assert_allclose(out, brute_force(q, k, v, start, LENGTHS), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(out, run(prefill, q, k, v, start))


@pytest.mark.parametrize("kv_format", ["int4", "fp8"])
def test_fp8_probabilities_cost_at_most_their_rounding(kv_format):
    """P V moves by at most 2^-4 sum p |v| (half a unit in the last place of E4M3), not at all for one visible slot."""
    q, k, v = operands(kv_format, fp8_query=True, slots=9)
    exact = brute_force(q, k, v, START, LENGTHS)
    out = run(prefill, q, k, v)
    weighted = brute_force(
        q, k, dataclasses.replace(v, values=v.values & 0x77 if kv_format == "int4" else abs(v.values)), START, LENGTHS
    )
    assert np.all(np.abs(out - exact) <= 2.0**-4 * weighted + 1e-5)
    assert np.abs(out - exact).max() > 1e-4  # the cast is really there
    np.testing.assert_allclose(out[0, 0], exact[0, 0], rtol=1e-6)


@pytest.mark.parametrize("attention", [prefill, decode], ids=["prefill", "decode"])
@pytest.mark.parametrize("kv_format", ["int4", "fp8", "none"])
def test_garbage_beyond_the_lengths_never_leaks(kv_format, attention):
    """NaN values and scales, infinities: the result is bit for bit that of zeros there."""
    q, k, v = operands(kv_format)

    def beyond(rows, filling):
        valid = (np.arange(9) < LENGTHS[:, None])[:, None, :, None]
        return jax.tree.map(lambda x: jnp.where(valid, x, jnp.asarray(filling).astype(x.dtype)), rows)

    clean = run(attention, q, beyond(k, 0), beyond(v, 0))
    assert np.all(np.isfinite(clean))
    # INT4 codes cannot be NaN (255 is any code); their scales can.
    for filling in (np.nan, np.inf) if kv_format != "int4" else (255, np.nan):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(run(attention, q, beyond(k, filling), beyond(v, filling)), clean)


def test_queries_that_see_nothing_give_zeros():
    """An empty sequence; and, without causality, a window that lies wholly beyond the valid slots."""
    q, k, v = operands()
    out = run(prefill, q, k, v, np.int32([0, 0, 6]), np.int32([0, 3, 2]), window=2, causal=False)
    assert not out[0].any()
    assert out[1, :4].all()
    assert not out[2].any()


def test_one_broken_sequence_leaves_the_others_alone():
    q, k, v = operands()
    out = run(prefill, q, dataclasses.replace(k, values=k.values.at[1].set(jnp.nan)), v)
    assert np.isnan(out[1]).all()  # and it shows there, as NaN and not as zeros
    np.testing.assert_array_equal(out[[0, 2]], run(prefill, q, k, v)[[0, 2]])


def test_scores_of_any_size_are_stable():
    """Scores around +-10^4 would overflow exp without the row maximum."""
    q, k, v = operands()
    q = dataclasses.replace(q, values=q.values * 4000)
    np.testing.assert_allclose(run(prefill, q, k, v), brute_force(q, k, v, START, LENGTHS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", [prefill, decode], ids=["prefill", "decode"])
@pytest.mark.parametrize("kv_format", ["none", "int4"])
def test_fp8_output_is_the_bf16_one_quantized_by_token(kv_format, attention):
    """Also where all of a token's heads are 0, and where one holds NaN."""
    q, k, v = operands(kv_format, fp8_query=kv_format == "int4")
    scale = k.values if k.scale is None else k.scale
    broken = scale.at[2, 1].set(jnp.nan)
    k = dataclasses.replace(k, values=broken) if k.scale is None else dataclasses.replace(k, scale=broken)
    options = {"query_start": START, "kv_lengths": np.int32([0, 4, 9]), "scale": SCALE}
    rows = attention(q, k, v, out_dtype=formats.E4M3, **options)
    expected = jax.jit(formats.quantize_fp8)(attention(q, k, v, **options).reshape(3, 5, 4 * H))
    assert (rows.values.shape, rows.scale.shape) == ((3, 5, 4 * H), (3, 5, 1))
    for actual, wanted in zip(rows, expected, strict=True):
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(wanted, np.float32))
    assert not np.asarray(rows.values[0], np.float32).any()
    assert (rows.scale[0] == 1).all()
    assert np.isnan(np.asarray(rows.values[2], np.float32)).any()


def test_broken_rows_are_errors():
    q, k, v = operands("int4")
    options = {"query_start": START, "kv_lengths": LENGTHS, "scale": 1.0}
    with pytest.raises(ValueError, match=r"value scale has shape \(3, 2, 9\)"):
        prefill_attention(q, k, dataclasses.replace(v, scale=v.scale[..., 0]), **options)
    with pytest.raises(ValueError, match=r"\(uint8\) and value .*\(float8_e4m3fn\)"):
        prefill_attention(q, k, ScaledArray(v.values.astype(formats.E4M3), v.scale, "fp8"), **options)


@pytest.mark.parametrize("attention", [prefill_attention, decode_attention], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"query": (3, 5, H)}, r"\(3, 5, 16\)"),
        ({"key": (2, 2, 9, H)}, r"\(2, 2, 9, 16\).*\[3, kv_heads, S, 16\]"),
        ({"key": (3, 2, 9, 8)}, r"\(3, 2, 9, 8\)"),
        ({"value": (3, 2, 8, H)}, r"\(3, 2, 9, 16\) \(float32\) and value \(3, 2, 8, 16\)"),
        ({"key": (3, 3, 9, H), "value": (3, 3, 9, H)}, "4 query heads cannot share 3"),
        ({"query_start": (2,)}, r"query_start.*\(2,\); expected \(3,\)"),
        ({"kv_lengths": (3, 1)}, r"kv_lengths.*\(3, 1\)"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, r"softcap is 0\.0"),
        ({"sinks": np.zeros(2)}, r"sinks has shape \(2,\); expected \(4,\)"),
        ({"implementation": "cuda"}, "'cuda'"),
    ],
)  # fmt: skip
def test_errors_quote_the_offending_value(attention, changes, quoted):
    shapes = {
        "query": (3, 5, 4, H),
        "key": (3, 2, 9, H),
        "value": (3, 2, 9, H),
        "query_start": (3,),
        "kv_lengths": (3,),
    }
    options = {name: value for name, value in changes.items() if name not in shapes}
    shapes |= {name: shape for name, shape in changes.items() if name in shapes}
    rows = [ScaledArray(jnp.zeros(shapes[name]), None, "none") for name in ("query", "key", "value")]
    lengths = {name: jnp.zeros(shapes[name], jnp.int32) for name in ("query_start", "kv_lengths")}
    with pytest.raises(ValueError, match=quoted):
        functools.partial(attention, scale=1.0)(*rows, **lengths, **options)


@pytest.mark.gpu
def test_whole_prompts_in_bf16_take_cudnn():
    batch, length, heads, kv_heads, head_dim = 2, 96, 4, 2, 64
    lengths = jnp.asarray([96, 41])
    q = normal(0, (batch, length, heads, head_dim))
    k, v = (normal(seed, (batch, kv_heads, length, head_dim)) for seed in (1, 2))
    rows = [ScaledArray(jnp.asarray(x, jnp.bfloat16), None, "none") for x in (q, k, v)]
    options = {"query_start": None, "kv_lengths": lengths, "scale": head_dim**-0.5}
    assert "cudnn" in prefill.lower(*rows, **options).as_text()
    out, expected = (
        np.asarray(prefill(*rows, implementation=implementation, **options), np.float32)
        for implementation in ("auto", "xla")
    )
    valid = np.arange(length) < np.asarray(lengths)[:, None]
    # Both round P and the result to bf16, 2^-9 of numbers below 1.
    np.testing.assert_allclose(out[valid], expected[valid], atol=0.01)
