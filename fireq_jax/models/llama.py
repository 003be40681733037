"""Llama: one set of classes for the float and the quantized model.

Inside, every batch is right-padded: sequence b's tokens come first in its row and ``lengths[b]``
says how many there are. ``__call__`` accepts any 0/1 mask and brings it to that form.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fireq_jax.models.attention import Attention
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.kv_cache import KVCache, LayerCache
from fireq_jax.models.layers import MLP, RMSNorm, Tap, no_tap
from fireq_jax.models.parameters import parameters_of, with_parameters
from fireq_jax.models.rope import rope_tables
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.decoder_layer import LayerWeights, after_attention, before_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.matmul import matmul
from pallas_kernels.projection import matmul_float
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream

if TYPE_CHECKING:
    from fireq_jax.checkpoints.folder import StoredModel

Positions = Literal["all", "last"]


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        quantization: QuantizationConfig,
        *,
        dtype: jax.typing.DTypeLike,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, implementation)
        self.self_attn = Attention(
            f"{name}.self_attn", config, quantization, dtype=dtype, implementation=implementation, rngs=rngs
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, implementation)
        self.mlp = MLP(
            f"{name}.mlp",
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            quantization=quantization,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )

    @property
    def weights(self) -> LayerWeights:
        """All but attention's own."""
        return LayerWeights(
            qkv=self.self_attn.qkv_proj.projection,
            o_proj=self.self_attn.o_proj.projection,
            gate_up=self.mlp.gate_up_proj.projection,
            down=self.mlp.down_proj.projection,
            input_norm=self.input_layernorm.norm,
            mlp_norm=self.post_attention_layernorm.norm,
        )

    def __call__(
        self,
        x: ResidualStream,
        rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        cache: LayerCache | None = None,
        capacity: int | None = None,
        tap: Tap = no_tap,
    ) -> tuple[ResidualStream, LayerCache | None]:
        """One block; arguments as in :meth:`~fireq_jax.models.attention.Attention.attend`."""
        weights, implementation = self.weights, self.self_attn.implementation
        # None is what ops call nobody.
        seen = None if tap is no_tap else tap
        packed, x = before_attention(x, weights, decoding=cache is not None, implementation=implementation, tap=seen)
        attention, new_cache = self.self_attn.attend(
            packed, x.dtype, rope, start=start, lengths=lengths, cache=cache, capacity=capacity, tap=tap
        )
        return after_attention(attention, x, weights, implementation=implementation, tap=seen), new_cache


class LlamaForCausalLM(nnx.Module):
    """Llama 2, 3, 3.1 and 3.2 with a language-model head.

    Attributes:
        config: the architecture.
        quantization: how it is quantized; ``recipes.none()`` for the float model.
        dtype: of embeddings, norms, float weights and hidden states.
    """

    def __init__(
        self,
        config: ModelConfig,
        quantization: QuantizationConfig | None = None,
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """A model with random weights, made directly in their storage format."""
        rngs = nnx.Rngs(0) if rngs is None else rngs
        quantization = recipes.none() if quantization is None else quantization
        quantization.check_fits(linear_names(config), config.head_dim)
        self.config, self.quantization, self.dtype = config, quantization, jnp.dtype(dtype)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param((jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype))
        self.layers = nnx.List(
            [
                DecoderLayer(f"layers.{i}", config, quantization, dtype=dtype, implementation=implementation, rngs=rngs)
                for i in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, implementation)
        head = None
        if quantization.lm_head_format == "fp8":
            head = QuantizedTensor.random(rngs.params(), shape, format="fp8")
        elif not config.tie_word_embeddings:
            head = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype)
        self.lm_head = None if head is None else nnx.Param(head)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        kv_format: formats.KVFormat | None = None,
        implementation: Implementation = "auto",
    ) -> Self:
        """Load a Hugging Face folder, or one that ``fireq-convert`` wrote.

        Args:
            folder: with ``config.json`` and safetensors or .bin files, or a converted model.
            dtype: of embeddings, norms, hidden states and unquantized weights.
            kv_format: overrides the cache format of the recipe.
            implementation: of the ops, see ``pallas_kernels.dispatch``.

        Raises:
            ValueError: if the folder is neither, is incomplete, or its tensors do not fit.
        """
        # Orbax takes a second to import, which a model made from scratch need not pay.
        from fireq_jax.checkpoints.folder import StoredModel

        stored = StoredModel.open(Path(folder))
        return cls.abstract(stored, dtype=dtype, kv_format=kv_format, implementation=implementation).filled(stored)

    @classmethod
    def abstract(
        cls,
        stored: "StoredModel",
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        kv_format: formats.KVFormat | None = None,
        implementation: Implementation = "auto",
    ) -> Self:
        """A folder's model with shapes for arrays: what a program can be compiled for while they are read.

        Arguments are those of :meth:`from_pretrained`, which is this and then :meth:`filled`.
        """
        quantization = stored.quantization if kv_format is None else stored.quantization.with_kv_format(kv_format)
        model = nnx.eval_shape(lambda: cls(stored.config, quantization, dtype=dtype, implementation=implementation))
        graph, state = nnx.split(model)
        place = stored.sharding
        placed = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place), state)
        return nnx.merge(graph, placed)

    def filled(self, stored: "StoredModel") -> Self:
        """This (abstract) model with the folder's arrays."""
        return with_parameters(self, stored.read(parameters_of(self), self.dtype))

    def save(self, folder: str | Path) -> None:
        """Write the model, without a tokenizer, to a folder that :meth:`from_pretrained` reads."""
        from fireq_jax.checkpoints.folder import save_model

        save_model(Path(folder), self.config, self.quantization, parameters_of(self))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        return formats.nbytes(nnx.state(self, nnx.Param))

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """float32 logits of every token.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens, 0 for padding anywhere in the row; None means no padding.
                Logits of padding are 0.

        Raises:
            ValueError: if the ids are no matrix of integers, or the mask has another shape. Values cannot
                be checked under jit.
        """
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids is {input_ids.dtype} {input_ids.shape}; expected integers [batch, tokens]")
        if input_ids.size == 0:
            raise ValueError(f"input_ids has shape {input_ids.shape}; expected at least one token")
        attention_mask = None if attention_mask is None else jnp.asarray(attention_mask)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {attention_mask.shape}; expected {input_ids.shape}")
        if attention_mask is None:
            lengths = jnp.full(input_ids.shape[:1], input_ids.shape[1], jnp.int32)
            return self._forward(input_ids, lengths, positions="all")[0]
        tokens, lengths, order = right_pad(input_ids, attention_mask)
        logits, _ = self._forward(tokens, lengths, positions="all")
        logits = jnp.take_along_axis(logits, jnp.argsort(order, axis=1)[..., None], axis=1)
        return jnp.where(attention_mask[..., None] > 0, logits, 0.0)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits of each sequence's last token, and a cache of ``capacity`` slots that holds the prompt.

        Args:
            tokens: right-padded prompts.
            lengths: tokens of each prompt, at least 1.
            capacity: slots of the cache.

        Raises:
            ValueError: if T exceeds ``capacity``.
        """
        logits, cache = self._forward(tokens, lengths, positions="last", capacity=capacity)
        assert cache is not None
        return logits, cache

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """One decode step (T = 1) or a further chunk of the prompt (T > 1).

        Args:
            tokens: right-padded new tokens.
            lengths: how many of each row are new; a sequence with 0 is left untouched and its
                logits mean nothing.
            cache: where the earlier tokens are; tokens beyond its capacity are not stored.

        Returns:
            Logits of each sequence's last new token, and the extended cache.
        """
        logits, new_cache = self._forward(tokens, lengths, positions="last", cache=cache)
        assert new_cache is not None
        return logits, new_cache

    def _forward(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        *,
        positions: Positions,
        cache: KVCache | None = None,
        capacity: int | None = None,
    ) -> tuple[Array, KVCache | None]:
        start = jnp.zeros_like(lengths) if cache is None else cache.lengths
        rope = rope_tables(self.config, start[:, None] + jnp.arange(tokens.shape[1]), start + lengths)
        x = ResidualStream(self.embed_tokens.get_value()[tokens])
        entries: list[LayerCache | None] = []
        for i, layer in enumerate(self.layers):
            entry = None if cache is None else cache.layers[i]
            graph, state = nnx.split(layer)
            x, entry = _run_layer(graph, state, x, rope, start, lengths, entry, capacity)
            entries.append(entry)
        hidden = x.finish()
        if positions == "last":
            hidden = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        new_cache = None
        if cache is not None or capacity is not None:
            new_cache = KVCache(tuple(entry for entry in entries if entry is not None), start + lengths)
        return self.logits(hidden), new_cache

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 logits of hidden states that left the last layer."""
        head = (self.embed_tokens if self.lm_head is None else self.lm_head).get_value()
        if isinstance(head, QuantizedTensor):
            # XLA multiplies FP8 by FP8 at full speed.
            return matmul(self.norm.quantized(x), head, out_dtype=jnp.float32, implementation="xla")
        return matmul_float(self.norm(x), head)


# Layers of one structure are traced and lowered once: inside a jitted model they call one function.
@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: ResidualStream,
    rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cache: LayerCache | None,
    capacity: int | None,
) -> tuple[ResidualStream, LayerCache | None]:
    layer = nnx.merge(graph, state)
    return layer(x, rope, start=start, lengths=lengths, cache=cache, capacity=capacity)


def right_pad(
    input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Int[Array, "B T"]]:
    """Move each row's tokens to its front.

    Returns:
        tokens [B, T], lengths [B], and ``order`` [B, T] with tokens = input_ids[order].
    """
    order = jnp.argsort(attention_mask == 0, axis=1, stable=True)
    lengths = jnp.sum(attention_mask > 0, axis=1).astype(jnp.int32)
    return jnp.take_along_axis(input_ids, order, axis=1), lengths, order


def linear_names(config: ModelConfig) -> list[str]:
    """Names of all linear layers, as ``QuantizationConfig.keep_float`` matches them."""
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"layers.{i}.{part}" for i in range(config.num_layers) for part in parts]
