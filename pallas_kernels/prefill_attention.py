"""Attention of a chunk of queries over keys and values: prefill, and the reference of decode.

Keys and values are rows in cache format (INT4, FP8 or plain), so that what prefill attends to is
exactly what decode will later read. With FP8 queries the probabilities are cast to FP8 for P.V,
as the tensor cores take them; scores, softmax statistics and sums are float32.

FireQ (arXiv 2505.20839), attention section; FlashAttention-3 (arXiv 2407.08608).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch, formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.operands import check_operands
from pallas_kernels.row_quantize import quantize_rows
from pallas_kernels.sm90.prefill_attention import config as sm90_config
from pallas_kernels.sm90.prefill_attention import launch as sm90

# Queries of a sequence that the reference scores at a time.
QUERIES_AT_ONCE = 1024


def prefill_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"] | None = None,
    kv_lengths: Int[Array, " B"],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "B T heads H"] | ScaledArray:
    """softmax(scale * Q K^T) V for ragged batches and chunks that start anywhere.

    Args:
        query: [B, T, heads, H], E4M3 with a float32 scale per token and head, or plain floats.
        key, value: [B, kv_heads, S, H] rows in cache format; slot s holds the token at position
            s of its sequence. ``heads`` is a multiple of ``kv_heads``; query head h reads kv head
            h // (heads // kv_heads).
        query_start: position of each sequence's first query; None says that all are 0, and if ``causal``
            then only as many slots as there are queries are looked at.
        kv_lengths: valid slots of each sequence; slots beyond are never read as data.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: a query sees the slots up to its own position.
        window: a query sees only the last ``window`` of them (sliding window).
        softcap: bound c of the scores, s becoming c * tanh(s / c) (Gemma 2); None: there is none.
        sinks: float32, a score of each head that joins the softmax without a value (gpt-oss).
        out_dtype: dtype of the result; E4M3 gives FP8 rows as o_proj reads them.
        implementation: see ``dispatch``. "auto" takes cuDNN for whole prompts in bf16 or float16.

    Returns:
        [B, T, heads, H]. A query that sees no slot gets zeros. With E4M3 the result in bf16, quantized
        by ``formats.quantize_fp8``: values [B, T, heads * H] and a float32 scale per token [B, T, 1].

    Raises:
        ValueError: if an operand is of another kind, shapes do not fit together or ``window`` or ``softcap`` is not
            positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    check_operands(Array, kv_lengths=kv_lengths)
    starts_at_zero = query_start is None
    query_start = jnp.zeros_like(kv_lengths) if query_start is None else query_start
    validate(query, key, value, query_start, kv_lengths, window, softcap, sinks)
    options = {
        "query_start": query_start, "kv_lengths": kv_lengths, "scale": scale, "causal": causal, "window": window,
        "softcap": softcap, "sinks": sinks, "out_dtype": float_dtype(out_dtype),
    }  # fmt: skip
    out = _attend(query, key, value, options, implementation, starts_at_zero=starts_at_zero)
    return as_output(out, out_dtype, implementation)


def _attend(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    options: dict[str, Any],
    implementation: dispatch.Implementation,
    *,
    starts_at_zero: bool,
) -> Float[Array, "B T heads H"]:
    """The op in floats, by cuDNN, the kernel or XLA; ``options`` are the reference's."""
    slots = key.values.shape[2]
    if starts_at_zero and options["causal"]:
        slots = min(slots, query.values.shape[1])
    plain = starts_at_zero and options["causal"] and all(options[x] is None for x in ("window", "softcap", "sinks"))
    if implementation == "auto" and plain and _cudnn_runs(query, key, value):
        kv_lengths, scale = options["kv_lengths"], options["scale"]
        out = _attention_cudnn(query, _first(key, slots), _first(value, slots), kv_lengths=kv_lengths, scale=scale)
        return out.astype(options["out_dtype"])
    unsupported = sm90_config.unsupported(query, key, value, options["scale"], options["out_dtype"])
    if dispatch.resolve("prefill_attention", implementation, unsupported) == "mosaic_gpu":
        return sm90.prefill_attention(query, key, value, slots=slots, **options)
    return attention_reference(query, _first(key, slots), _first(value, slots), **options)


def _first(rows: ScaledArray, slots: int) -> ScaledArray:
    """Rows [B, kv_heads, S, H] of the first ``slots`` tokens."""
    return jax.tree.map(lambda x: x[:, :, :slots], rows)


def float_dtype(out_dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype in which attention is rounded before its output is ``out_dtype``."""
    return jnp.bfloat16 if jnp.dtype(out_dtype) == formats.E4M3 else out_dtype


def as_output(
    out: Float[Array, "B T heads H"], out_dtype: jax.typing.DTypeLike, implementation: dispatch.Implementation
) -> Float[Array, "B T heads H"] | ScaledArray:
    """What an attention op returns of ``out`` in :func:`float_dtype`: that, or its tokens' rows in FP8."""
    if jnp.dtype(out_dtype) != formats.E4M3:
        return out
    return quantize_rows(out.reshape(*out.shape[:2], -1), implementation=implementation)


def attention_reference(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    fp8_weights: bool | None = None,
) -> Float[Array, "B T heads H"]:
    """Both attention ops in ``jax.numpy``: the kernels' oracle and the path without a Hopper GPU.

    At most ``QUERIES_AT_ONCE`` queries of a sequence are in flight, so that the scores of a long
    prompt need not fit in memory. ``fp8_weights``: whether attention weights are cast to FP8 for P.V;
    None: where queries are FP8, as in the kernels.
    """
    fp8_weights = query.format == "fp8" if fp8_weights is None else fp8_weights
    if query.format == key.format == value.format == "none":
        q, k, v = query.values, key.values, value.values
    else:
        q, k, v = (formats.dequantize(rows) for rows in (query, key, value))
    # Slots beyond kv_lengths may hold anything, NaN included, and 0 * NaN is NaN.
    v = jnp.where((jnp.arange(v.shape[2])[None] < kv_lengths[:, None])[:, None, :, None], v, jnp.zeros((), v.dtype))

    def attend(q: Float[Array, "B t heads H"], start: Int[Array, " B"]) -> Float[Array, "B t heads H"]:
        batch, length, heads, head_dim = q.shape
        kv_heads, slots = k.shape[1:3]
        visible = visible_slots(start, kv_lengths, length, slots, causal=causal, window=window)
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        scores = _multiply("btkgh,bksh->bkgts", grouped, k) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        weights, row_sum = _softmax(scores, visible[:, None, None], sinks)
        row_sum = jnp.moveaxis(row_sum, -1, 1)[..., None]
        if fp8_weights:
            weights = formats.quantize_probabilities(weights)
        out = _multiply("bkgts,bksh->btkgh", weights.astype(v.dtype), v)
        # A query without a visible slot has a sum of 0; a NaN stays one.
        out = jnp.where(row_sum == 0, 0.0, out / jnp.where(row_sum == 0, 1.0, row_sum))
        return out.reshape(q.shape).astype(out_dtype)

    batch, length, heads, head_dim = q.shape
    if length <= QUERIES_AT_ONCE:
        return attend(q, query_start)
    chunks = math.ceil(length / QUERIES_AT_ONCE)
    padded = jnp.pad(q, ((0, 0), (0, chunks * QUERIES_AT_ONCE - length), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(batch, chunks, QUERIES_AT_ONCE, heads, head_dim), 1, 0)
    starts = query_start[None] + QUERIES_AT_ONCE * jnp.arange(chunks)[:, None]
    out = jax.lax.map(lambda chunk: attend(*chunk), (split, starts))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]


def _softmax(
    scores: Float[Array, "B kv_heads group t S"],
    visible: Bool[Array, "B 1 1 t S"],
    sinks: Float[Array, " heads"] | None,
) -> tuple[Float[Array, "B kv_heads group t S"], Float[Array, "B kv_heads group t"]]:
    """exp(score - row_max) of visible slots, and its sum over them and the sink; a query that sees neither has 0."""
    scores = jnp.where(visible, scores, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    row_max = jnp.where(jnp.isneginf(row_max), 0.0, row_max)
    weights = jnp.exp(scores - row_max)
    row_sum = jnp.sum(weights, axis=-1)
    if sinks is not None:
        # Where this overflows the sink has all the weight, and 0 is left.
        own = sinks.astype(jnp.float32).reshape(1, scores.shape[1], -1, 1)
        row_sum += jnp.exp(own - row_max[..., 0])
    return weights, row_sum


def _multiply(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    """The float32 product of float arrays."""

    def wide(a: Array, b: Array) -> Array:
        # A GPU would otherwise multiply float32 operands as TF32.
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def narrow(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    if a.dtype != b.dtype or a.dtype == jnp.float32:
        return wide(a, b)
    # XLA's CPU backend lacks some products of halves.
    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def _cudnn_runs(query: ScaledArray, key: ScaledArray, value: ScaledArray) -> bool:
    """Whether the operands are plain halves on a GPU (Ampere or later), for which cuDNN has a flash attention."""
    head_dim = query.values.shape[-1]
    plain = all(
        rows.format == "none" and rows.values.dtype in (jnp.bfloat16, jnp.float16) for rows in (query, key, value)
    )
    return plain and head_dim % 8 == 0 and head_dim <= 128 and dispatch.compute_capability() >= (8, 0)


def _attention_cudnn(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, *, kv_lengths: Int[Array, " B"], scale: float
) -> Float[Array, "B T heads H"]:
    """Causal attention of whole prompts; queries beyond ``kv_lengths`` get zeros."""
    return jax.nn.dot_product_attention(
        query.values, key.values.swapaxes(1, 2), value.values.swapaxes(1, 2), scale=scale, is_causal=True,
        query_seq_lengths=kv_lengths, key_value_seq_lengths=kv_lengths, implementation="cudnn",
    )  # fmt: skip


def visible_slots(
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    queries: int,
    slots: int,
    *,
    causal: bool,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which slots each query may attend to."""
    slot = jnp.arange(slots)[None, None]
    position = (query_start[:, None] + jnp.arange(queries)[None])[..., None]
    visible = jnp.broadcast_to(slot < kv_lengths[:, None, None], (query_start.shape[0], queries, slots))
    if causal:
        visible &= slot <= position
    if window is not None:
        visible &= slot > position - window
    return visible


def validate(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    window: int | None,
    softcap: float | None,
    sinks: Float[Array, " heads"] | None,
) -> None:
    """Raise ValueError unless the operands of an attention op fit together."""
    check_operands(ScaledArray, query=query, key=key, value=value)
    check_operands(Array, query_start=query_start, kv_lengths=kv_lengths)
    if query.values.ndim != 4:
        raise ValueError(f"query has shape {query.values.shape}; expected [B, T, heads, H]")
    batch, _, heads, head_dim = query.values.shape
    stored = formats.stored_width(key.format, head_dim)
    if key.values.ndim != 4 or key.values.shape[0] != batch or key.values.shape[3] != stored:
        raise ValueError(
            f"key has shape {key.values.shape} ({key.values.dtype}); expected [{batch}, kv_heads, S, {stored}] "
            f"for a query of shape {query.values.shape}"
        )
    for name, rows in (("query", query), ("key", key), ("value", value)):
        scale = rows.scale
        if scale is not None and (scale.shape[:-1] != rows.values.shape[:-1] or head_dim % scale.shape[-1]):
            expected = (*rows.values.shape[:-1], "groups")
            raise ValueError(f"{name} scale has shape {scale.shape}; expected {expected}, groups dividing {head_dim}")
    if (key.format, key.values.shape, key.values.dtype) != (value.format, value.values.shape, value.values.dtype):
        raise ValueError(
            f"key has shape {key.values.shape} ({key.values.dtype}) and value {value.values.shape} "
            f"({value.values.dtype}); expected the same"
        )
    if heads % key.values.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key.values.shape[1]} kv heads; expected a multiple")
    for name, lengths in (("query_start", query_start), ("kv_lengths", kv_lengths)):
        if lengths.shape != (batch,):
            raise ValueError(f"{name} has shape {lengths.shape}; expected {(batch,)}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected a positive number of tokens or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a positive number or None")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; expected {(heads,)}")
