"""Block-by-block calibration: run a float block over the calibration tokens and measure it.

Hidden states are carried from block to block, so only one block's weights are in memory. The step
is compiled once and reused for every block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.models.config import ModelConfig
from fireq_jax.models.layers import Tap, no_tap
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import Block, fuse_block, with_parameters
from fireq_jax.models.rope import rope_tables
from fireq_jax.quantization import recipes
from fireq_jax.quantization.key_smoothing import KeyMoments, KeyStatistics

# Of all tokens, one in so many is kept in KeyStatistics.sample; a prime, so that over a few sequences
# every position comes up.
SAMPLE_STRIDE = 13
LINEAR_INPUTS = ("qkv_input", "o_input", "gate_up_input", "down_input")


class ChannelStatistics(NamedTuple):
    """Of each channel of a linear layer's input, over all calibration tokens."""

    absmax: Float[Array, " K"]
    mean_abs: Float[Array, " K"]


class BlockStatistics(NamedTuple):
    """What calibration measures of one block.

    ``inputs`` is keyed by ``LINEAR_INPUTS``; ``values`` are second moments of each head's values.
    """

    inputs: dict[str, ChannelStatistics]
    keys: KeyStatistics
    values: Float[Array, "kv_heads H H"]


class Calibrator:
    """Runs float blocks in float32 over batches of hidden states.

    Args:
        config: the architecture.
        batch_size: sequences a step, at most; the largest divisor of the number of samples is
            used, so that every step has the same shape and every token the same weight.
    """

    def __init__(self, config: ModelConfig, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a positive number of sequences")
        self.config = config
        self.batch_size = batch_size
        self._layer = nnx.eval_shape(
            lambda: DecoderLayer(
                "layers.0", config, recipes.none(), dtype=jnp.float32, implementation="xla", rngs=nnx.Rngs(0)
            )
        )

    def run(
        self, block: Block, hidden: Float[np.ndarray, "samples T D"]
    ) -> tuple[Float[np.ndarray, "samples T D"], BlockStatistics]:
        """Output of a block for all samples, and its statistics.

        Args:
            block: float32 weights by Hugging Face name without layer prefix.
            hidden: the block's input, float32.
        """
        graph, state = nnx.split(with_parameters(self._layer, fuse_block(block)))
        output = np.empty_like(hidden)
        batches: list[BlockStatistics] = []
        for part in batches_of(len(hidden), self.batch_size):
            result, statistics = block_step(graph, self.config, state, jnp.asarray(hidden[part]))
            output[part] = np.asarray(result)
            batches.append(statistics)
        return output, _combine(batches)


def batches_of(samples: int, batch_size: int) -> list[slice]:
    """Samples cut into equal batches, the largest of at most ``batch_size`` that divide them."""
    size = max(size for size in range(1, batch_size + 1) if samples % size == 0)
    return [slice(begin, begin + size) for begin in range(0, samples, size)]


def run_layer(layer: DecoderLayer, config: ModelConfig, hidden: Float[Array, "B T D"], tap: Tap = no_tap) -> Array:
    """A decoder layer's output for whole sequences that start at position 0."""
    batch, length, _ = hidden.shape
    start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
    rope = rope_tables(config, jnp.broadcast_to(jnp.arange(length), (batch, length)), lengths)
    output, _ = layer(hidden, rope, start=start, lengths=lengths, tap=tap)
    return output


@functools.partial(jax.jit, static_argnums=(0, 1))
def block_step(
    graph: nnx.GraphDef[DecoderLayer], config: ModelConfig, state: nnx.State, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], BlockStatistics]:
    """One batch through one block."""
    seen: dict[str, Array] = {}
    output = run_layer(nnx.merge(graph, state), config, hidden, seen.__setitem__)
    inputs = {name: _channel_statistics(seen[name]) for name in LINEAR_INPUTS}
    first, second = jnp.split(seen["key_before_rope"], 2, axis=-1)
    pair_max = jnp.max(jnp.hypot(first, second), axis=(0, 1))
    channel_max = jnp.max(jnp.abs(seen["key_after_rope"]), axis=(0, 1))
    key, query = seen["key_after_rope"], seen["query_after_rope"]
    grouped = query.reshape(-1, config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    moments = KeyMoments(
        jnp.mean(key, axis=(0, 1)), jnp.mean(jnp.square(key), axis=(0, 1)), jnp.mean(jnp.square(grouped), axis=(0, 2))
    )
    sample = key.reshape(-1, *key.shape[2:])[::SAMPLE_STRIDE]
    values = (
        jnp.einsum("btki,btkj->kij", seen["value"], seen["value"], precision="highest") / seen["value"][..., 0, 0].size
    )
    return output, BlockStatistics(inputs, KeyStatistics(pair_max, channel_max, moments, sample), values)


def _channel_statistics(x: Float[Array, "B T K"]) -> ChannelStatistics:
    magnitude = jnp.abs(x)
    return ChannelStatistics(jnp.max(magnitude, axis=(0, 1)), jnp.mean(magnitude, axis=(0, 1)))


def _combine(batches: list[BlockStatistics]) -> BlockStatistics:
    """Statistics of all batches, which are of equal size: maxima of maxima, means of means."""
    inputs = {
        name: ChannelStatistics(
            jnp.max(jnp.stack([batch.inputs[name].absmax for batch in batches]), axis=0),
            jnp.mean(jnp.stack([batch.inputs[name].mean_abs for batch in batches]), axis=0),
        )
        for name in LINEAR_INPUTS
    }

    def reduce(function: Callable[..., Array], values: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: function(jnp.stack(leaves), axis=0), *values)

    largest = reduce(jnp.max, [batch.keys._replace(moments=None, sample=None) for batch in batches])
    moments = reduce(jnp.mean, [batch.keys.moments for batch in batches])
    sample = jnp.concatenate([batch.keys.sample for batch in batches])
    values = jnp.mean(jnp.stack([batch.values for batch in batches]), axis=0)
    return BlockStatistics(inputs, largest._replace(moments=moments, sample=sample), values)
