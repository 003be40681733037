"""Attention of one or a few new queries over the cache: one step of generation.

The same function as ``prefill_attention``, with its own op because the best kernel is another:
here reading the cache is all the work.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import decode_attention_sm90 as sm90
from pallas_kernels import dispatch
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import attention_reference, validate


def decode_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "B T heads H"]:
    """Causal attention of the newest T tokens over a cache [B, kv_heads, S, H] that holds them.

    Arguments, result and errors are those of :func:`~pallas_kernels.prefill_attention.prefill_attention`.
    """
    validate(query, key, value, query_start, kv_lengths, window)
    run = attention_reference
    if dispatch.resolve("decode_attention", implementation, sm90.unsupported(query, key, value)) == "mosaic_gpu":
        run = sm90.decode_attention_sm90
    return run(
        query, key, value, query_start=query_start, kv_lengths=kv_lengths, scale=scale, window=window,
        out_dtype=out_dtype,
    )  # fmt: skip
