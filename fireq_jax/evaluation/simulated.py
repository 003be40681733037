"""Layers whose roundings can be switched one by one, for experiments; real models round all that their config says.

Hidden states are float32 and weights are multiplied as what their codes stand for, so that a layer with all of its
roundings differs from the real one, in float32, by the order of sums only.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from fireq_jax.models import CausalLM
from fireq_jax.models.attention import Attention
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.experts import Experts
from fireq_jax.models.kv_cache import LayerCache
from fireq_jax.models.layers import Tap, no_tap
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.rope import query_growth, rope_tables
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.decoder_layer import LayerWeights, after_attention
from pallas_kernels.formats import KVFormat, ScaledArray
from pallas_kernels.prefill_attention import attention_reference
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.rope_quantize import rope_quantize_reference
from pallas_kernels.split_k import reduced

Rounded = Literal["fp8", "none", "own"]


@dataclasses.dataclass(frozen=True)
class Roundings:
    """What a simulated layer rounds, besides its weights, which are what they are. "own": as the recipe has it there.

    Attributes:
        activations: inputs of linear layers, per token. Of experts only what all of them read.
        queries: per token and head.
        keys, values: as the cache stores them.
        probabilities: attention weights, for their product with the values.
    """

    activations: Rounded = "none"
    queries: Rounded = "none"
    keys: KVFormat | Literal["own"] = "none"
    values: KVFormat | Literal["own"] = "none"
    probabilities: Rounded = "none"

    def of_layer(self, quantization: QuantizationConfig) -> "Roundings":
        """The same with formats in place of "own"."""
        queries, cache = quantization.query_format, quantization.kv_format
        own = {
            "activations": quantization.activation_format, "queries": queries, "keys": cache, "values": cache,
            "probabilities": queries,
        }  # fmt: skip
        return dataclasses.replace(self, **{name: own[name] for name in own if getattr(self, name) == "own"})


def embed(model: CausalLM, tokens: Int[np.ndarray, "B T"]) -> Float32[Array, "B T D"]:
    """What enters the first layer."""
    rows = model.embed_tokens.get_value()[jnp.asarray(tokens)].astype(jnp.float32)
    return rows * jnp.float32(model.config.embedding_scale)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    config: ModelConfig,
    quantization: QuantizationConfig,
    roundings: Roundings,
    state: nnx.State,
    x: Float32[Array, "B T D"],
) -> Float32[Array, "B T D"]:
    """A layer's output for whole sequences that start at position 0.

    Args:
        graph, state: of the layer (``nnx.split``). ``state`` may hold quantized weights where ``graph`` had others.
        config: the architecture.
        quantization: the layer's (``Attention.quantization``): clips and groups of keys and values, and what is "own".
        roundings: what is rounded.
        x: the layer's input.
    """
    return forward(nnx.merge(graph, state), config, quantization, roundings, x)


def forward(
    layer: DecoderLayer,
    config: ModelConfig,
    quantization: QuantizationConfig,
    roundings: Roundings,
    x: Float32[Array, "B T D"],
    tap: Tap = no_tap,
) -> Float32[Array, "B T D"]:
    """:func:`run_layer` of a layer that is whole.

    ``tap`` sees "qkv_input", "o_input", "gate_up_input" and (but of experts) "down_input", before they are rounded,
    and as attention reads them "query" [B, T, heads, H] and "key" [B, kv_heads, T, H].
    """
    weights, roundings = _in_float(layer.weights), roundings.of_layer(quantization)
    run = functools.partial(project, out_dtype=jnp.float32, implementation="xla")

    def rows(name: str, x: Float[Array, "B T K"]) -> Float[Array, "B T K"]:
        tap(name, x)
        return formats.dequantize(formats.quantize_fp8(x)) if roundings.activations == "fp8" else x

    def mlp(normalized: Array, residual: Array) -> Array:
        normalized = rows("gate_up_input", normalized)
        if isinstance(layer.mlp, Experts):
            return layer.mlp(normalized, residual).astype(jnp.float32)
        assert weights.gate_up is not None
        assert weights.down is not None
        hidden = reduced(run(normalized, weights.gate_up, activation=weights.activation))
        hidden = rows("down_input", hidden[..., : weights.down.weight.shape[1]])
        norm = weights.mlp_output_norm
        if norm is None:
            return reduced(run(hidden, weights.down, residual=residual))
        return ResidualStream(run(hidden, weights.down), residual, norm).finish()

    first = rows("qkv_input", x if weights.input_norm is None else weights.input_norm(x))
    packed = reduced(run(first, weights.qkv))
    attention = rows("o_input", _attention(layer, packed, config, quantization, roundings, tap))
    stream = ResidualStream(x, normalized=first if weights.parallel else None)
    rest = dataclasses.replace(weights, gate_up=None, down=None)
    return after_attention(attention, stream, rest, mlp, implementation="xla").finish()


def _attention(
    layer: DecoderLayer,
    packed: Float[Array, "B T packed"],
    config: ModelConfig,
    quantization: QuantizationConfig,
    roundings: Roundings,
    tap: Tap,
) -> Float[Array, "B T heads_H"]:
    attention, (batch, length) = layer.self_attn, packed.shape[:2]
    places = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    key, value = (
        LayerCache.create(dataclasses.replace(quantization, kv_format=kv_format), shape, jnp.float32).key
        for kv_format in (roundings.keys, roundings.values)
    )
    query, key, value = rope_quantize_reference(
        packed,
        *rope_tables(config, layer.rope, places, lengths),
        key,
        value,
        start=start,
        lengths=lengths,
        norm=attention.head_norm,
        post_rope_scale=None if attention.post_rope_scale is None else attention.post_rope_scale.get_value(),
        key_offset=None if attention.key_offset is None else attention.key_offset.get_value(),
        query_factor=query_growth(config, places),
        key_clip=quantization.key_clip,
        value_clip=quantization.value_clip,
        unbiased_keys=quantization.unbiased_keys,
        quantize_query=roundings.queries == "fp8",
    )
    if tap is not no_tap:
        tap("query", formats.dequantize(query))
        tap("key", formats.dequantize(key))
    fp8_weights = roundings.probabilities == "fp8"
    return attend(attention, config, query, key, value, fp8_weights=fp8_weights).reshape(batch, length, -1)


def attend(
    attention: Attention, config: ModelConfig, query: ScaledArray, key: ScaledArray, value: ScaledArray, **options: Any
) -> Float[Array, "B T heads H"]:
    """The layer's attention of whole sequences; ``options`` are the reference's own."""
    lengths = jnp.full((query.values.shape[0],), query.values.shape[1], jnp.int32)
    return attention_reference(
        query,
        key,
        value,
        query_start=jnp.zeros_like(lengths),
        kv_lengths=lengths,
        scale=config.scale,
        window=attention.window,
        softcap=config.attention_softcap,
        sinks=None if attention.sinks is None else attention.sinks.get_value(),
        out_dtype=jnp.float32,
        **options,
    )


def _in_float(weights: LayerWeights) -> LayerWeights:
    """The same with what codes stand for in place of codes."""

    def plain(projection: Projection | None) -> Projection | None:
        if projection is None or not isinstance(projection.weight, QuantizedTensor):
            return projection
        return dataclasses.replace(projection, weight=projection.weight.dequantize())

    names = ("qkv", "o_proj", "gate_up", "down")
    changes: dict[str, Any] = {name: plain(getattr(weights, name)) for name in names}
    return dataclasses.replace(weights, **changes)
