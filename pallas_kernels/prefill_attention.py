"""Attention of a chunk of queries over keys and values: prefill, and the reference of decode.

Keys and values are rows in cache format (INT4, FP8 or plain), so that what prefill attends to is
exactly what decode will later read. With FP8 queries the probabilities are cast to FP8 for P.V,
as the tensor cores take them; scores, softmax statistics and sums are float32.

FireQ (arXiv 2505.20839), attention section; FlashAttention-3 (arXiv 2407.08608).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch, formats
from pallas_kernels import prefill_attention_sm90 as sm90
from pallas_kernels.formats import ScaledArray


def prefill_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "B T heads H"]:
    """softmax(scale * Q K^T) V for ragged batches and chunks that start anywhere.

    Args:
        query: [B, T, heads, H], E4M3 with a float32 scale per token and head, or plain floats.
        key, value: [B, kv_heads, S, H] rows in cache format; slot s holds the token at position
            s of its sequence. ``heads`` is a multiple of ``kv_heads``; query head h reads kv head
            h // (heads // kv_heads).
        query_start: position of each sequence's first query.
        kv_lengths: valid slots of each sequence; slots beyond are never read as data.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: a query sees the slots up to its own position.
        window: a query sees only the last ``window`` of them (sliding window).
        out_dtype: dtype of the result.
        implementation: see ``dispatch``.

    Returns:
        [B, T, heads, H]. A query that sees no slot gets zeros.

    Raises:
        ValueError: if shapes do not fit together or ``window`` is not positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    validate(query, key, value, query_start, kv_lengths, window)
    unsupported = sm90.unsupported(query, key, value, scale, out_dtype)
    run = attention_reference
    if dispatch.resolve("prefill_attention", implementation, unsupported) == "mosaic_gpu":
        run = sm90.prefill_attention_sm90
    return run(
        query, key, value, query_start=query_start, kv_lengths=kv_lengths, scale=scale, causal=causal, window=window,
        out_dtype=out_dtype,
    )  # fmt: skip


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
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[Array, "B T heads H"]:
    """Both attention ops in ``jax.numpy``: the kernels' oracle and the path without a Hopper GPU."""
    q, k, v = formats.dequantize(query), formats.dequantize(key), formats.dequantize(value)
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    visible = visible_slots(query_start, kv_lengths, length, slots, causal=causal, window=window)
    # Slots beyond kv_lengths may hold anything, NaN included, and 0 * NaN is NaN.
    v = jnp.where((jnp.arange(slots) < kv_lengths[:, None])[:, None, :, None], v, 0.0)

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    # "highest": a GPU would otherwise multiply float32 operands as TF32.
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, precision="highest") * scale
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = jnp.sum(weights, axis=-1)
    if query.scale is not None:
        weights = formats.quantize_probabilities(weights)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, v, precision="highest")
    total = jnp.moveaxis(total, -1, 1)[..., None]
    # A query without a visible slot has a total of 0; a NaN stays one.
    out = jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
    return out.reshape(batch, length, heads, head_dim).astype(out_dtype)


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
    slot = jnp.arange(slots)
    position = (query_start[:, None] + jnp.arange(queries))[..., None]
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
) -> None:
    """Raise ValueError unless the operands of an attention op fit together."""
    if query.values.ndim != 4:
        raise ValueError(f"query has shape {query.values.shape}; expected [B, T, heads, H]")
    batch, _, heads, head_dim = query.values.shape
    stored = head_dim // 2 if key.values.dtype == jnp.uint8 else head_dim
    if key.values.ndim != 4 or key.values.shape[0] != batch or key.values.shape[3] != stored:
        raise ValueError(
            f"key has shape {key.values.shape} ({key.values.dtype}); expected [{batch}, kv_heads, S, {stored}] "
            f"for a query of shape {query.values.shape}"
        )
    for name, rows in (("key", key), ("value", value)):
        scale = rows.scale
        if scale is not None and (scale.shape[:-1] != rows.values.shape[:-1] or head_dim % scale.shape[-1]):
            expected = (*rows.values.shape[:-1], "groups")
            raise ValueError(f"{name} scale has shape {scale.shape}; expected {expected}, groups dividing {head_dim}")
        if scale is None and not jnp.issubdtype(rows.values.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {rows.values.dtype} and no scale")
    if (key.values.shape, key.values.dtype) != (value.values.shape, value.values.dtype):
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
