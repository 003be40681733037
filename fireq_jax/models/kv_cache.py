"""The key-value cache: static shapes, one slot for each token of a sequence.

Slot s of a sequence holds its token at position s, whatever padding the batch had, so a mask is
only a length. Rows are INT4, FP8 or plain (``formats.quantize_kv``), one scale a token and head.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, kv_heads, S, ...] each."""

    key: ScaledArray
    value: ScaledArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers' keys and values.

    Attributes:
        layers: one :class:`LayerCache` a layer.
        lengths: int32 [B], filled slots of each sequence.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Slots S of each sequence."""
        return self.layers[0].key.values.shape[2]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        quantization: QuantizationConfig,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ) -> Self:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""
        if capacity < 1:
            raise ValueError(f"cache capacity is {capacity}; expected a positive number of tokens")
        rows = jax.ShapeDtypeStruct((batch, config.num_kv_heads, capacity, config.head_dim), dtype)
        stored = jax.eval_shape(
            lambda x: formats.quantize_kv(x, quantization.kv_format, quantization.kv_group_size), rows
        )

        def empty() -> ScaledArray:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stored)

        layers = tuple(LayerCache(empty(), empty()) for _ in range(config.num_layers))
        return cls(layers, jnp.zeros((batch,), jnp.int32))


def fill(rows: ScaledArray, capacity: int) -> ScaledArray:
    """A cache entry whose first T slots are ``rows`` [B, kv_heads, T, ...]; the rest is empty."""
    length = rows.values.shape[2]
    if length > capacity:
        raise ValueError(f"the prompt has {length} tokens; the cache holds {capacity}")
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, capacity - length), (0, 0))), rows)


def append(entry: ScaledArray, rows: ScaledArray, start: Int[Array, " B"], lengths: Int[Array, " B"]) -> ScaledArray:
    """Write the first ``lengths[b]`` of ``rows`` [B, kv_heads, T, ...] at slots ``start[b]`` onwards."""
    batch, kv_heads, length = rows.values.shape[:3]
    capacity = entry.values.shape[2]
    offset = jnp.arange(length)
    slots = jnp.where(offset < lengths[:, None], start[:, None] + offset, capacity)
    index = (jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None], slots[:, None, :])
    return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), entry, rows)
