"""Attention of one or a few new queries over the cache: one step of generation.

The same function as ``prefill_attention``, with its own op because the best kernel is another:
here reading the cache is all the work.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.formats import ScaledArray
from pallas_kernels.operands import check_operands
from pallas_kernels.prefill_attention import as_output, attention_reference, float_dtype, validate
from pallas_kernels.sm90.decode_attention import config as sm90_config
from pallas_kernels.sm90.decode_attention import launch as sm90


def decode_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    page_table: Int[Array, "B pages"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "B T heads H"] | ScaledArray:
    """Causal attention of the newest T tokens over a cache [B, kv_heads, S, H] that holds them.

    With a ``page_table`` the cache is [pages, kv_heads, page_size, H] instead, and page
    page_table[b, i] holds the slots i * page_size ... of sequence b. Entries beyond kv_lengths
    must be valid pages; what these hold does not matter. The other arguments, the result and the
    errors are those of :func:`~pallas_kernels.prefill_attention.prefill_attention`.
    """
    check_operands(ScaledArray, key=key, value=value)
    check_operands(Array | None, page_table=page_table)
    in_one_piece = (key, value) if page_table is None else jax.eval_shape(gather_pages, key, value, page_table)
    validate(query, in_one_piece[0], in_one_piece[1], query_start, kv_lengths, window, softcap, sinks)
    unsupported = sm90_config.unsupported(query, key, value, page_table)
    if dispatch.resolve("decode_attention", implementation, unsupported) == "mosaic_gpu":
        return sm90.decode_attention(
            query, key, value, query_start=query_start, kv_lengths=kv_lengths, scale=scale, window=window,
            softcap=softcap, sinks=sinks, page_table=page_table, out_dtype=out_dtype,
        )  # fmt: skip
    if page_table is not None:
        key, value = gather_pages(key, value, page_table)
    out = attention_reference(
        query, key, value, query_start=query_start, kv_lengths=kv_lengths, scale=scale, window=window,
        softcap=softcap, sinks=sinks, out_dtype=float_dtype(out_dtype),
    )  # fmt: skip
    return as_output(out, out_dtype, implementation)


def gather_pages(
    key: ScaledArray, value: ScaledArray, page_table: Int[Array, "B pages"]
) -> tuple[ScaledArray, ScaledArray]:
    """A paged cache [pages, kv_heads, page_size, X] as a consecutive one [B, kv_heads, S, X]."""

    def gather(pages: Array) -> Array:
        rows = pages[page_table].swapaxes(1, 2)  # [B, kv_heads, pages, page_size, X]
        return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])

    return jax.tree.map(gather, key), jax.tree.map(gather, value)
