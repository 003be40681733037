"""From the output of the qkv matmul to attention's operands: split, norm, RoPE, key scaling, quantize, append.

Everything between the packed input and the stored codes is float32; nothing is rounded on the way.
FireQ (arXiv 2505.20839), RoPE-aware quantization; RoPE: arXiv 2104.09864.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.head_norm import HeadNorm
from pallas_kernels.operands import check_operands
from pallas_kernels.sm90.rope_quantize import config as sm90_config
from pallas_kernels.sm90.rope_quantize import launch as sm90
from pallas_kernels.split_k import SplitKPartials, reduced


def rope_quantize(
    packed: Float[Array, "B T packed"] | SplitKPartials,
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    key: ScaledArray,
    value: ScaledArray,
    *,
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    norm: HeadNorm | None = None,
    post_rope_scale: Float[Array, "kv_heads H"] | None = None,
    key_offset: Float[Array, "kv_heads H"] | None = None,
    query_factor: Float[Array, "B T"] | None = None,
    key_clip: float = 1.0,
    value_clip: float = 1.0,
    unbiased_keys: bool = False,
    quantize_query: bool = True,
    implementation: dispatch.Implementation = "auto",
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """The queries of a chunk, and the cache with the chunk's keys and values in it.

    Args:
        packed: the heads of q, k and v side by side, (heads + 2 kv_heads) * H columns; or what
            they are the sum of.
        cos, sin: float32, of each token's position.
        key, value: the layer's cache [B, kv_heads, S, ...] in any of the cache formats; the new
            rows are quantized to the format it has. Donate it, and it is updated in place.
        start: slot of each sequence's first token.
        lengths: tokens of each sequence; later ones in ``packed`` are not stored, nor are those
            whose slot is not in the cache. All other slots keep what they hold.
        norm: of the queries and keys, before RoPE or behind it; None: there is none.
        post_rope_scale: float32, FireQ's S: rotated keys are multiplied by it and the queries that
            read them by 1 / S.
        key_offset: float32, subtracted from the scaled keys.
        query_factor: float32, multiplies a token's queries behind everything else; into the scale where they
            have one (Ministral 3, whose scores grow with the position).
        key_clip, value_clip, unbiased_keys: ``clip`` and ``unbiased`` of
            :func:`~pallas_kernels.formats.quantize_kv`.
        quantize_query: to E4M3 with a float32 scale per token and head; else the dtype of ``packed``.
        implementation: see ``dispatch``.

    Returns:
        The query [B, T, heads, H], and the new key and value cache.

    Raises:
        ValueError: if shapes do not fit together or a clip is not positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    operands: dict[str, Any] = {
        "start": start, "lengths": lengths, "norm": norm, "post_rope_scale": post_rope_scale, "key_offset": key_offset,
        "query_factor": query_factor,
    }  # fmt: skip
    clips = {"key_clip": key_clip, "value_clip": value_clip}
    _validate(packed, cos, sin, key, value, **operands, clips=clips)
    unsupported = sm90_config.unsupported(packed, cos, sin, key, value, quantize_query, norm)
    options = {**operands, **clips, "unbiased_keys": unbiased_keys}
    if dispatch.resolve("rope_quantize", implementation, unsupported) == "mosaic_gpu":
        return sm90.rope_quantize(packed, cos, sin, key, value, **options)
    return rope_quantize_reference(reduced(packed), cos, sin, key, value, **options, quantize_query=quantize_query)


def rope_quantize_reference(
    packed: Float[Array, "B T packed"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    key: ScaledArray,
    value: ScaledArray,
    *,
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    norm: HeadNorm | None = None,
    post_rope_scale: Float[Array, "kv_heads H"] | None = None,
    key_offset: Float[Array, "kv_heads H"] | None = None,
    query_factor: Float[Array, "B T"] | None = None,
    key_clip: float = 1.0,
    value_clip: float = 1.0,
    unbiased_keys: bool = False,
    quantize_query: bool = True,
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """The op in ``jax.numpy``: the kernel's oracle and the path of the other formats."""
    queries, keys, values = (x.astype(jnp.float32) for x in split_heads(packed, key.values.shape[1], cos))
    queries, keys = rotate_heads(queries, keys, cos, sin, norm)
    if post_rope_scale is not None:
        keys *= post_rope_scale[None, None]
        queries *= jnp.repeat(1 / post_rope_scale, queries.shape[2] // keys.shape[2], axis=0)[None, None]
    if key_offset is not None:
        keys -= key_offset[None, None]
    query = _query(queries, query_factor, None if quantize_query else packed.dtype)
    new_keys = _quantize_as(key, jnp.swapaxes(keys, 1, 2), key_clip, unbiased=unbiased_keys)
    new_values = _quantize_as(value, jnp.swapaxes(values, 1, 2), value_clip)
    return query, _append(key, new_keys, start, lengths), _append(value, new_values, start, lengths)


def split_heads(packed: Float[Array, "B T packed"], kv_heads: int, cos: Float[Array, "B T half"]) -> list[Array]:
    """[B, T, heads, H] queries, [B, T, kv_heads, H] keys and values."""
    head_dim = 2 * cos.shape[-1]
    rows = packed.reshape(*packed.shape[:2], packed.shape[2] // head_dim, head_dim)
    heads = rows.shape[2] - 2 * kv_heads
    return jnp.split(rows, [heads, heads + kv_heads], axis=2)


def rotate_heads(
    queries: Float[Array, "B T heads H"],
    keys: Float[Array, "B T kv_heads H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    norm: HeadNorm | None = None,
) -> tuple[Float[Array, "B T heads H"], Float[Array, "B T kv_heads H"]]:
    """RoPE of both, with the norm before or behind it; that makes them float32."""
    if norm is not None and norm.placement == "before_rope":
        queries, keys = norm(queries, keys)
    queries, keys = apply_rope(queries, cos, sin), apply_rope(keys, cos, sin)
    if norm is not None and norm.placement == "after_rope":
        queries, keys = norm(queries, keys)
    return queries, keys


def apply_rope(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (i, i + H/2) of each head."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _query(
    queries: Float[Array, "B T heads H"], factor: Float[Array, "B T"] | None, dtype: jax.typing.DTypeLike | None
) -> ScaledArray:
    """The query in ``dtype``, or E4M3 for None; the factor is in its scale there."""
    factors = None if factor is None else factor.astype(jnp.float32)[..., None, None]
    if dtype is not None:
        return ScaledArray((queries if factors is None else queries * factors).astype(dtype), None, "none")
    values, scale = formats.quantize_fp8(queries)
    assert scale is not None
    return ScaledArray(values, scale if factors is None else scale * factors)


def _quantize_as(
    entry: ScaledArray, rows: Float[Array, "*rows H"], clip: float, *, unbiased: bool = False
) -> ScaledArray:
    """``rows`` in the format of a cache entry."""
    if entry.scale is None:
        return dataclasses.replace(entry, values=rows.astype(entry.values.dtype))
    return formats.quantize_kv(rows, entry.format, rows.shape[-1] // entry.scale.shape[-1], clip, unbiased=unbiased)


def _append(entry: ScaledArray, rows: ScaledArray, start: Int[Array, " B"], lengths: Int[Array, " B"]) -> ScaledArray:
    """Write the first ``lengths[b]`` of ``rows`` [B, kv_heads, T, ...] at slots ``start[b]`` onwards."""
    batch, kv_heads, length = rows.values.shape[:3]
    capacity = entry.values.shape[2]
    offset = jnp.arange(length)[None]
    slots = start[:, None] + offset
    # Negative slots would count from the end.
    slots = jnp.where((offset < lengths[:, None]) & (slots >= 0), slots, capacity)
    index = (jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None], slots[:, None])
    return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), entry, rows)


def _validate(
    packed: Array | SplitKPartials,
    cos: Array,
    sin: Array,
    key: ScaledArray,
    value: ScaledArray,
    *,
    start: Array,
    lengths: Array,
    norm: HeadNorm | None,
    post_rope_scale: Array | None,
    key_offset: Array | None,
    query_factor: Array | None,
    clips: dict[str, float],
) -> None:
    """Raise ValueError unless the operands fit together."""
    check_operands(Array | SplitKPartials, packed=packed)
    check_operands(ScaledArray, key=key, value=value)
    check_operands(Array, cos=cos, sin=sin, start=start, lengths=lengths)
    check_operands(Array | None, post_rope_scale=post_rope_scale, key_offset=key_offset)
    shape = (*packed.rows, packed.n) if isinstance(packed, SplitKPartials) else packed.shape
    if len(shape) != 3:
        raise ValueError(f"packed has shape {shape}; expected [B, T, (heads + 2 kv_heads) * H]")
    batch, length, columns = shape
    if cos.shape != sin.shape or cos.shape[:2] != (batch, length) or cos.ndim != 3:
        raise ValueError(f"cos has shape {cos.shape} and sin {sin.shape}; expected ({batch}, {length}, H / 2)")
    head_dim = 2 * cos.shape[-1]
    stored = formats.stored_width(key.format, head_dim)
    if key.values.ndim != 4 or key.values.shape[0] != batch or key.values.shape[3] != stored:
        raise ValueError(
            f"key has shape {key.values.shape} ({key.values.dtype}); expected [{batch}, kv_heads, S, {stored}]"
        )
    key_form, value_form = (jax.tree.map(lambda x: (x.shape, str(x.dtype)), entry) for entry in (key, value))
    if key_form != value_form:
        raise ValueError(f"key is {key_form} and value {value_form}; expected the same")
    if key.scale is not None and (key.scale.shape[:3] != key.values.shape[:3] or head_dim % key.scale.shape[-1]):
        raise ValueError(f"key scale has shape {key.scale.shape}; expected {(*key.values.shape[:3], 'groups')}")
    kv_heads = key.values.shape[1]
    heads = columns // head_dim - 2 * kv_heads
    if columns % head_dim or heads < 1 or heads % kv_heads:
        expected = f"(n + 2) * {kv_heads * head_dim} for {kv_heads} kv heads of {head_dim}"
        raise ValueError(f"packed has {columns} columns; expected {expected}")
    for name, array in (("start", start), ("lengths", lengths)):
        if array.shape != (batch,):
            raise ValueError(f"{name} has shape {array.shape}; expected {(batch,)}")
    if norm is not None:
        norm.validate(heads, kv_heads, head_dim)
    for name, array, expected in (
        ("post_rope_scale", post_rope_scale, (kv_heads, head_dim)),
        ("key_offset", key_offset, (kv_heads, head_dim)),
        ("query_factor", query_factor, (batch, length)),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
    for name, clip in clips.items():
        if clip <= 0:
            raise ValueError(f"{name} is {clip}; expected a positive number")
