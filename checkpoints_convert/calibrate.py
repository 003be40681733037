"""Block-by-block calibration: run a float block over the calibration tokens and measure it.

Hidden states are carried from block to block, so only one block's weights are in memory. The step
is compiled once and reused for every block.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints_convert.algorithms.keys import KeyMoments, KeySample, KeyStatistics
from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.models.block import Block, fuse_block, linears_of
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.layers import LayerOptions, Tap, no_tap
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import abstract, with_parameters
from fireq_jax.models.rope import query_growth, rope_tables
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels.residual_stream import ResidualStream

# One token in so many goes into KeyStatistics.sample, from each sequence with another offset.
SAMPLE_STRIDE = 13
Hidden = Float[np.ndarray, "samples T D"]  # of calibration text, between two blocks


class ChannelStatistics(NamedTuple):
    """Of each channel of a linear layer's input, over all calibration tokens; others' tokens are 0 for an expert."""

    absmax: Float[Array, "*experts K"]
    mean_abs: Float[Array, "*experts K"]


class BlockStatistics(NamedTuple):
    """What calibration measures of one block.

    ``inputs`` is keyed by the names of the inputs of ``models.block.linears_of``; ``values`` are second moments of
    each head's values.
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

    def run(self, block: Block, index: int, hidden: Hidden) -> tuple[Hidden, BlockStatistics]:
        """Output of a block for all samples, and its statistics.

        Args:
            block: float32 weights, in the form that ``models.block`` describes.
            index: of the block.
            hidden: the block's input, float32.
        """
        graph, state = nnx.split(with_parameters(abstract_layer(self.config, recipes.none(), index), fuse_block(block)))
        output = np.empty_like(hidden)
        batches: list[BlockStatistics] = []
        for part in batches_of(len(hidden), self.batch_size):
            indices = jnp.arange(part.start, part.stop)
            result, statistics = block_step(graph, self.config, state, jnp.asarray(hidden[part]), indices)
            output[part] = np.asarray(result)
            batches.append(statistics)
        return output, _combine(batches)


def abstract_layer(config: ModelConfig, quantization: QuantizationConfig, index: int) -> DecoderLayer:
    """The shapes of a float32 decoder layer that computes as layer ``index`` does.

    It is called "layers.0" whichever that is, so that layers which compute alike are compiled once; with patterns in
    it, ``quantization`` is :func:`layer_quantization`.
    """
    return abstract(
        lambda: DecoderLayer("layers.0", index, config, LayerOptions(quantization, jnp.float32, "xla", nnx.Rngs(0)))
    )


def layer_quantization(
    config: ModelConfig, quantization: QuantizationConfig, index: int, quantized: Collection[str] | None = None
) -> QuantizationConfig:
    """What patterns say of layer ``index``, as the config of one that is called "layers.0".

    Args:
        config: the architecture.
        quantization: of the model.
        index: of the layer.
        quantized: names, in the layer, of the linear layers that are quantized already; others are floats. None means
            all that the config does not keep float.
    """
    found = {
        linear.name: quantization.weight_format_of(f"layers.{index}.{linear.name}")
        for linear in linears_of(config)
        if quantized is None or linear.name in quantized
    }
    quantized = [name for name, weight_format in found.items() if weight_format != "none"]
    floats = [f"layers.0.{linear.name}" for linear in linears_of(config) if linear.name not in quantized]
    others = [(f"layers.0.{name}", found[name]) for name in quantized if found[name] != quantization.weight_format]
    return dataclasses.replace(
        quantization.for_attention(f"layers.{index}.self_attn"),
        keep_float=() if quantization.weight_format == "none" else tuple(floats),
        layer_formats=tuple(others),
    )


def batches_of(samples: int, batch_size: int) -> list[slice]:
    """Samples cut into equal batches, the largest of at most ``batch_size`` that divide them."""
    size = max(size for size in range(1, batch_size + 1) if samples % size == 0)
    return [slice(begin, begin + size) for begin in range(0, samples, size)]


def run_layer(layer: DecoderLayer, config: ModelConfig, hidden: Float[Array, "B T D"], tap: Tap = no_tap) -> Array:
    """A decoder layer's output for whole sequences that start at position 0."""
    batch, length, _ = hidden.shape
    start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    rope = rope_tables(config, layer.rope, positions, lengths)
    growth = query_growth(config, positions)
    output, _ = layer(ResidualStream(hidden), rope, start=start, lengths=lengths, growth=growth, tap=tap)
    return output.finish()


def run_samples(layer: DecoderLayer, config: ModelConfig, hidden: Hidden, batch_size: int) -> Hidden:
    """:func:`run_layer` of all samples, in :func:`batches_of` them."""
    graph, state = nnx.split(layer)
    output = np.empty_like(hidden)
    for part in batches_of(len(hidden), batch_size):
        output[part] = np.asarray(_output(graph, config, state, jnp.asarray(hidden[part])))
    return output


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILE_QUICKLY)
def _output(
    graph: nnx.GraphDef[DecoderLayer], config: ModelConfig, state: nnx.State, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    return run_layer(nnx.merge(graph, state), config, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILE_QUICKLY)
def block_step(
    graph: nnx.GraphDef[DecoderLayer],
    config: ModelConfig,
    state: nnx.State,
    hidden: Float[Array, "B T D"],
    indices: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], BlockStatistics]:
    """One batch through one block; ``indices`` number its sequences."""
    seen: dict[str, Array] = {}
    layer = nnx.merge(graph, state)
    output = run_layer(layer, config, hidden, seen.__setitem__)
    if "expert_weights" in seen:
        routed = jnp.moveaxis(seen["expert_weights"] > 0, -1, 0)[..., None]
        seen["down_input"] = jnp.where(routed, seen["down_input"], 0.0)
    inputs = {linear.input: _channel_statistics(seen[linear.input]) for linear in linears_of(config)}
    key, value = seen["key_after_rope"], seen["value"]
    first, second = jnp.split(key, 2, axis=-1)
    pair_max = jnp.max(jnp.hypot(first, second), axis=(0, 1))
    channel_max = jnp.max(jnp.abs(key), axis=(0, 1))
    query = seen["query_after_rope"].reshape(*key.shape[:3], -1, config.head_dim)
    moments = KeyMoments(
        jnp.mean(key, axis=(0, 1)), jnp.mean(jnp.square(key), axis=(0, 1)), jnp.mean(jnp.square(query), axis=(0, 1, 3))
    )
    weight = layer.self_attn.o_proj.weight.get_value()
    assert isinstance(weight, Array)  # of a float layer
    columns = weight.reshape(-1, *query.shape[2:])
    readers = jnp.einsum("dkgi,dkgj->kgij", columns, columns, precision="highest")
    window, sinks = layer.self_attn.window, layer.self_attn.sinks
    sinks = None if sinks is None else sinks.get_value().reshape(config.num_kv_heads, -1)
    sample = jax.lax.map(
        lambda sequence: _sample_keys(sequence, readers, sinks, config, window), (query, key, value, indices)
    )
    sample = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sample)
    values = jnp.einsum("btki,btkj->kij", value, value, precision="highest") / (value.shape[0] * value.shape[1])
    return output, BlockStatistics(inputs, KeyStatistics(pair_max, channel_max, moments, sample), values)


def _sample_keys(
    sequence: tuple[
        Float[Array, "T kv_heads group H"], Float[Array, "T kv_heads H"], Float[Array, "T kv_heads H"], Int[Array, ""]
    ],
    readers: Float[Array, "kv_heads group H H"],
    sinks: Float[Array, "kv_heads group"] | None,
    config: ModelConfig,
    window: int | None,
) -> KeySample:
    """Some keys of a sequence (its queries, keys, values and number), and how its output depends on them.

    ``readers`` are Gram matrices of o_proj's columns for each query head; see :class:`KeySample`. ``sinks`` and
    ``window`` are the layer's.
    """
    query, key, value, index = sequence
    length = key.shape[0]
    positions = jnp.minimum(index % SAMPLE_STRIDE + SAMPLE_STRIDE * jnp.arange(-(-length // SAMPLE_STRIDE)), length - 1)
    behind = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = (behind >= 0) & (behind < (length if window is None else window))
    dot = functools.partial(jnp.einsum, precision="highest")

    def reads_of_head(head: tuple[Array, Array, Array, Array, Array | None]) -> Float[Array, "tokens half"]:
        query, key, value, readers, sinks = head
        scores, slope = dot("tgh,sh->gts", query, key) * config.scale, 1.0
        if (cap := config.attention_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
            slope = 1 - jnp.square(scores / cap)
        scores = jnp.where(visible, scores, -jnp.inf)
        if sinks is not None:
            own = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, own], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :length]
        output = dot("gts,sh->gth", weights, value)
        # |o_proj (v_s - output_t)|^2, multiplied out.
        read = dot("gij,sj->gsi", readers, value[positions])
        distance = (
            dot("gsi,si->gs", read, value[positions])[:, None]
            - 2 * dot("gti,gsi->gts", output, read)
            + dot("gti,gti->gt", dot("gti,gij->gtj", output, readers), output)[..., None]
        )
        sensitivity = jnp.square(weights * slope)[..., positions] * jnp.maximum(distance, 0.0)
        first, second = jnp.split(jnp.square(query), 2, axis=-1)
        return dot("gts,tgp->sp", sensitivity, first + second)

    # One kv head at a time: all heads' scores need not fit in memory.
    heads = jnp.moveaxis(query, 1, 0), jnp.moveaxis(key, 1, 0), jnp.moveaxis(value, 1, 0), readers, sinks
    return KeySample(key[positions], jnp.moveaxis(jax.lax.map(reads_of_head, heads), 0, 1))


def _channel_statistics(x: Float[Array, "*experts B T K"]) -> ChannelStatistics:
    magnitude = jnp.abs(x)
    return ChannelStatistics(jnp.max(magnitude, axis=(-3, -2)), jnp.mean(magnitude, axis=(-3, -2)))


@jax.jit
def _combine(batches: list[BlockStatistics]) -> BlockStatistics:
    """Statistics of all batches, which are of equal size: maxima of maxima, means of means."""
    inputs = {
        name: ChannelStatistics(
            jnp.max(jnp.stack([batch.inputs[name].absmax for batch in batches]), axis=0),
            jnp.mean(jnp.stack([batch.inputs[name].mean_abs for batch in batches]), axis=0),
        )
        for name in batches[0].inputs
    }

    def reduce(function: Callable[..., Array], values: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: function(jnp.stack(leaves), axis=0), *values)

    largest = reduce(jnp.max, [batch.keys._replace(moments=None, sample=None) for batch in batches])
    moments = reduce(jnp.mean, [batch.keys.moments for batch in batches])
    sample = jax.tree.map(lambda *parts: jnp.concatenate(parts), *[batch.keys.sample for batch in batches])
    values = jnp.mean(jnp.stack([batch.values for batch in batches]), axis=0)
    return BlockStatistics(inputs, largest._replace(moments=moments, sample=sample), values)
