"""What both attention kernels are given: operands they can take, how these lie in shared memory, and the softmax."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.registers import CODE_UNIT

HEAD_DIMS = (64, 128, 256)
_LOG2E = math.log2(math.e)


def unsupported_operands(query: ScaledArray, key: ScaledArray, value: ScaledArray) -> str | None:
    """Why the attention kernels cannot take these formats or sizes, or None."""
    head_dim = query.values.shape[-1]
    if query.format != "fp8" or query.scale is None:
        return f"the query is {query.values.dtype}, not E4M3 with scales"
    if query.scale.dtype != jnp.float32 or query.scale.shape != (*query.values.shape[:-1], 1):
        return f"the query scales are {query.scale.dtype} {query.scale.shape}, not one float32 a token and head"
    if reason := unsupported_cache(key, value):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, not one of {HEAD_DIMS}"
    if query.values.size == 0 or key.values.size == 0:
        return "there is nothing to attend to"
    return None


def unsupported_cache(key: ScaledArray, value: ScaledArray) -> str | None:
    """Why the kernels cannot read or write a cache in this format, or None."""
    for name, rows in (("key", key), ("value", value)):
        if rows.format != "int4":
            return f"the {name} cache is in format {rows.format!r}, not INT4"
        if rows.scale is None or rows.scale.dtype != jnp.bfloat16 or rows.scale.shape[-1] != 1:
            return f"the {name} scales are not one bf16 number a token and head"
    return None


@dataclasses.dataclass(frozen=True)
class Softmax:
    """What a kernel is compiled for: from Q K^T to exponents of 2, which the hardware has instead of exp.

    Attributes:
        to_scores: what q . k, with k in units of its codes' E4M3 values (``CODE_UNIT``), is multiplied by: the result
            is a score in units of log2, or with a ``softcap`` the score over the cap.
        softcap: the cap c of c * tanh(s / c), in units of log2; None: there is none.
        window: a query sees the last ``window`` slots up to its own; None: all of them.
        causal: a query sees no slot behind its own.
    """

    to_scores: float
    softcap: float | None = None
    window: int | None = None
    causal: bool = True

    @classmethod
    def of(cls, scale: float, *, softcap: float | None, window: int | None, causal: bool = True) -> Self:
        """From the op's arguments of these names."""
        to_scores = scale * (_LOG2E if softcap is None else 1 / softcap) / CODE_UNIT
        return cls(to_scores, None if softcap is None else softcap * _LOG2E, window, causal)


def sinks_in_log2(sinks: Float[Array, " heads"]) -> Float[Array, " heads"]:
    """The sinks' scores in units of log2."""
    return sinks.astype(jnp.float32) * _LOG2E


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = formats.E4M3, columns: int | None = None) -> Any:
    """Shared memory in WGMMA's order; a product may take ``columns`` of it."""
    return plgpu.SMEM(shape, dtype, transforms=swizzle(columns or shape[-1], dtype))


def swizzle(columns: int, dtype: jax.typing.DTypeLike = formats.E4M3) -> tuple[Any, ...]:
    """Transforms of shared memory in WGMMA's order: rows of up to 128 bytes in tiles of 8, swizzled."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, columns * size)
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)
