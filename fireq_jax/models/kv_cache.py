"""The key-value cache: static shapes, one slot for each token of a sequence.

Slot s of a sequence holds its token at position s, whatever padding the batch had, so a mask is
only a length. Rows are INT4, FP8 or plain (``formats.quantize_kv``), one scale a token and head.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, kv_heads, S, ...] each."""

    key: ScaledArray
    value: ScaledArray

    @classmethod
    def create(
        cls,
        quantization: QuantizationConfig,
        shape: tuple[int, int, int, int],
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ) -> Self:
        """An empty cache of ``shape`` [B, kv_heads, S, H]; ``dtype`` is that of rows that are not quantized."""
        stored = jax.eval_shape(
            lambda x: formats.quantize_kv(x, quantization.kv_format, quantization.kv_group_size),
            jax.ShapeDtypeStruct(shape, dtype),
        )
        key, value = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored) for _ in range(2))
        return cls(key, value)


@functools.cache
def slot_bytes(config: ModelConfig, quantization: QuantizationConfig, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of one token's keys and values in all layers; ``dtype`` is that of rows that are not quantized."""
    return formats.nbytes(jax.eval_shape(lambda: KVCache.create(config, quantization, 1, 1, dtype).layers))


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

    def cut(self, lengths: Int[np.ndarray, " B"] | Sequence[int]) -> Self:
        """The same, with no more than the first ``lengths`` tokens of each sequence; copies nothing else.

        Raises:
            ValueError: for lengths that are not one for each sequence, or negative.
        """
        most = np.asarray(lengths)
        if most.shape != self.lengths.shape or not np.issubdtype(most.dtype, np.integer) or most.min(initial=0) < 0:
            raise ValueError(f"lengths are {lengths!r}; expected {len(self.lengths)} whole numbers of at least 0")
        place = self.lengths.sharding if self.lengths.committed else None
        shorter = np.minimum(most, jax.device_get(self.lengths)).astype(np.int32)
        return dataclasses.replace(self, lengths=jax.device_put(shorter, place))

    def grown(self, capacity: int) -> Self:
        """The same, with ``capacity`` slots, at least as many as it has."""
        more = capacity - self.capacity
        if more == 0:
            return self

        def padded(x: Array) -> Array:
            return jnp.pad(x, [(0, more) if axis == 2 else (0, 0) for axis in range(x.ndim)])

        return dataclasses.replace(self, layers=jax.tree.map(padded, self.layers))

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
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        own = [quantization.for_attention(f"layers.{i}.self_attn") for i in range(config.num_layers)]
        layers = tuple(LayerCache.create(layer, shape, dtype) for layer in own)
        return cls(layers, jnp.zeros((batch,), jnp.int32))
