"""The decoder of Llama and its relatives: one set of classes for all families, float or quantized.

Inside, every batch is right-padded: sequence b's tokens come first in its row and ``lengths[b]``
says how many there are. ``__call__`` accepts any 0/1 mask and brings it to that form.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fireq_jax.devices import Device, placement
from fireq_jax.models.attention import Attention
from fireq_jax.models.block import linear_names, norm_names
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.experts import Experts
from fireq_jax.models.inputs import on_device, right_pad
from fireq_jax.models.kv_cache import KVCache, LayerCache
from fireq_jax.models.layers import MLP, LayerOptions, Norm, Tap, no_tap
from fireq_jax.models.parameters import Parameter, abstract, parameters_of, with_parameters
from fireq_jax.models.rope import Tables, query_growth, rope_tables
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels import norm as norm_op
from pallas_kernels.decoder_layer import LayerWeights, after_attention, before_attention
from pallas_kernels.dispatch import Implementation, check_implementation
from pallas_kernels.matmul import matmul
from pallas_kernels.projection import matmul_float
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream

if TYPE_CHECKING:
    from fireq_jax.checkpoints.folder import StoredModel

Positions = Literal["all", "last"]


class ModelOptions(TypedDict, total=False):
    """Options of :meth:`CausalLM.from_pretrained`, which says what they mean."""

    dtype: jax.typing.DTypeLike
    kv_format: formats.KVFormat | None
    implementation: Implementation
    device: Device | str | None
    sharding: jax.sharding.Sharding | None


class LayerOutput(NamedTuple):
    """What a decoder layer returns: the stream for the next, and its cache, if it has one."""

    x: ResidualStream
    cache: LayerCache | None


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms where ``config.norm_order`` has them."""

    def __init__(self, name: str, index: int, config: ModelConfig, options: LayerOptions) -> None:
        """Layer ``index``; ``name`` is what ``QuantizationConfig.keep_float`` matches."""

        def norm(kind: str) -> Norm | None:
            return Norm(config, options.implementation) if kind in norm_names(config) else None

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(f"{name}.self_attn", config, options, config.window_of(index))
        self.attention_output_norm = norm("attention_output_norm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = (Experts if config.experts is not None else MLP)(f"{name}.mlp", config, options)
        self.mlp_output_norm = norm("mlp_output_norm")
        self.rope = config.rope_of(index)
        self.parallel = config.norm_order == "parallel"

    @property
    def weights(self) -> LayerWeights:
        """All but attention's own."""

        def operand(norm: Norm | None) -> norm_op.Norm | None:
            return None if norm is None else norm.operand

        own = (
            {}
            if isinstance(self.mlp, Experts)
            else {
                "gate_up": self.mlp.gate_up_proj.projection,
                "down": self.mlp.down_proj.projection,
                "activation": self.mlp.activation,
            }
        )
        return LayerWeights(
            qkv=self.self_attn.qkv_proj.projection,
            o_proj=self.self_attn.o_proj.projection,
            input_norm=operand(self.input_layernorm),
            attention_output_norm=operand(self.attention_output_norm),
            mlp_norm=operand(self.post_attention_layernorm),
            mlp_output_norm=operand(self.mlp_output_norm),
            parallel=self.parallel,
            **own,
        )

    def __call__(
        self,
        x: ResidualStream,
        rope: Tables,
        *,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        growth: Float[Array, "B T"] | None = None,
        cache: LayerCache | None = None,
        capacity: int | None = None,
        tap: Tap = no_tap,
    ) -> LayerOutput:
        """One block; arguments as in :meth:`~fireq_jax.models.attention.Attention.attend`."""
        weights, implementation = self.weights, self.self_attn.implementation
        # None is what ops call nobody.
        seen = None if tap is no_tap else tap
        packed, x = before_attention(x, weights, decoding=cache is not None, implementation=implementation, tap=seen)
        attention, new_cache = self.self_attn.attend(
            packed=packed,
            rope=rope,
            start=start,
            lengths=lengths,
            growth=growth,
            cache=cache,
            capacity=capacity,
            tap=tap,
        )
        mlp = functools.partial(self.mlp, tap=tap) if isinstance(self.mlp, Experts) else None
        x = after_attention(attention, x, weights, mlp, implementation=implementation, tap=seen)
        return LayerOutput(x, new_cache)


class CausalLM(nnx.Module):
    """A decoder with a language-model head, of any family that ``config`` can describe.

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
        check_implementation(implementation)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        quantization = recipes.none() if quantization is None else quantization
        quantization.check_fits(linear_names(config), config.head_dim)
        options = LayerOptions(quantization, dtype, implementation, rngs)
        self.config, self.quantization, self.dtype = config, quantization, jnp.dtype(dtype)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param((jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype))
        self.layers = nnx.List([DecoderLayer(f"layers.{i}", i, config, options) for i in range(config.num_layers)])
        self.norm = Norm(config, implementation)
        head = None
        if quantization.lm_head_format == "fp8":
            head = QuantizedTensor.random(rngs.params(), shape, format="fp8")
        elif not config.tie_word_embeddings:
            head = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype)
        self.lm_head = None if head is None else nnx.Param(head)
        self.head_basis = nnx.Param(jnp.eye(shape[1], dtype=dtype)) if head is None and quantization.rotates else None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        kv_format: formats.KVFormat | None = None,
        implementation: Implementation = "auto",
        device: Device | str | None = None,
        sharding: jax.sharding.Sharding | None = None,
        verify: bool = True,
    ) -> Self:
        """Load a Hugging Face folder, a GGUF file, or a folder that ``fireq-convert`` wrote.

        Weights that were quantized by others keep their codes where these are exact
        (:func:`~fireq_jax.checkpoints.kept_codes.quantization_as_stored`), else they become floats.

        Args:
            folder: with ``config.json`` and safetensors or .bin files, or a converted model; or a GGUF file, or a
                folder with nothing else (``pip install 'fireq-jax[gguf]'``).
            dtype: of embeddings, norms, hidden states and unquantized weights.
            kv_format: overrides the cache format of the recipe.
            implementation: of the ops, see ``pallas_kernels.dispatch``.
            device: where the arrays go, and what runs on them: a device or its name, such as "gpu:1"; of the kind of
                JAX's default device. None leaves it to JAX.
            sharding: of every array, in place of a device, such as a replicated ``NamedSharding``.
            verify: of a converted model, that its files are those that were written; costs hashing them
                (:func:`~fireq_jax.whole_files.digest`).

        Raises:
            ValueError: if the folder is none of these, is incomplete, has changed, or its tensors do not fit.
        """
        # Orbax takes a second to import, which a model made from scratch need not pay.
        from fireq_jax.checkpoints.folder import StoredModel

        stored = StoredModel.open(Path(folder), verify=verify)
        options = ModelOptions(
            dtype=dtype, kv_format=kv_format, implementation=implementation, device=device, sharding=sharding
        )
        return cls.abstract(stored, **options).filled(stored)

    @classmethod
    def abstract(
        cls,
        stored: "StoredModel",
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        kv_format: formats.KVFormat | None = None,
        implementation: Implementation = "auto",
        device: Device | str | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """A folder's model with shapes for arrays: what a program can be compiled for while they are read.

        Arguments are those of :meth:`from_pretrained`, which is this and then :meth:`filled`.
        """
        quantization = stored.quantization if kv_format is None else stored.quantization.with_kv_format(kv_format)
        model = abstract(lambda: cls(stored.config, quantization, dtype=dtype, implementation=implementation))
        graph, state = nnx.split(model)
        place = placement(device, sharding) or stored.sharding
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
            ValueError: for ids that are no integers [B, T], or outside the vocabulary where the mask is 1; for a mask
                of another shape, or other numbers than 0 and 1. Values cannot be checked under jit.
        """
        input_ids, attention_mask = on_device(input_ids, attention_mask, self.config.vocab_size)
        graph, state = nnx.split(self)
        compute: Any = jax.sharding.auto_axes(
            lambda state, *inputs: nnx.merge(graph, state)._all_logits(*inputs),
            out_sharding=jax.sharding.PartitionSpec(*jax.typeof(input_ids).sharding.spec[:1]),
        )
        # The constants of eager operations are transferred as well, and are none of the caller's data.
        with jax.transfer_guard_host_to_device("allow"):
            return compute(state, input_ids, attention_mask)

    def _all_logits(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None
    ) -> Float[Array, "B T V"]:
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
        config, places = self.config, start[:, None] + jnp.arange(tokens.shape[1])[None]
        ropes = {rope: rope_tables(config, rope, places, start + lengths) for rope in config.ropes}
        growth = query_growth(config, places)
        x = self.embed_tokens.get_value()[tokens]
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        stream = ResidualStream(x)
        entries: list[LayerCache | None] = []
        for i, layer in enumerate(self.layers):
            entry = None if cache is None else cache.layers[i]
            graph, state = nnx.split(layer)
            stream, entry = _run_layer(graph, state, stream, ropes[layer.rope], start, lengths, growth, entry, capacity)
            entries.append(entry)
        x = stream.finish()
        if positions == "last":
            x = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        new_cache = None
        if cache is not None or capacity is not None:
            new_cache = KVCache(tuple(entry for entry in entries if entry is not None), start + lengths)
        return self.logits(x), new_cache

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 logits of hidden states that left the last layer."""
        head = (self.embed_tokens if self.lm_head is None else self.lm_head).get_value()
        basis = None if self.head_basis is None else self.head_basis.get_value()
        return apply_head(self.config, self.norm, head, x, basis)


def apply_head(
    config: ModelConfig, norm: Norm, head: Parameter, x: Float[Array, "*rows D"], basis: Parameter | None = None
) -> Float[Array, "*rows V"]:
    """float32 logits: the last norm, ``head`` [V, D], plain or FP8, and what the family does to them.

    ``basis`` [D, D] is of a plain head that is tied to embeddings in another basis than the norm's gain.
    """
    if isinstance(head, QuantizedTensor):
        # XLA multiplies FP8 by FP8 at full speed.
        logits = matmul(norm.quantized(x), head, out_dtype=jnp.float32, implementation="xla")
    else:
        rows = norm(x)
        if basis is not None:
            assert not isinstance(basis, QuantizedTensor)
            rows = matmul_float(rows, basis).astype(rows.dtype)
        logits = matmul_float(rows, head)
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


# The name under which those who come from transformers look for it.
AutoModelForCausalLM = CausalLM


class LlamaForCausalLM(CausalLM):
    """A model of the Llama family, and of no other."""

    @classmethod
    def abstract(cls, stored: "StoredModel", **options: Unpack[ModelOptions]) -> Self:
        """:meth:`CausalLM.abstract`.

        Raises:
            ValueError: for a folder with a model of another family.
        """
        if (found := stored.config.model_type) != "llama":
            raise ValueError(f"{stored.folder} holds a {found}; expected a llama, or use AutoModelForCausalLM")
        return super().abstract(stored, **options)


# Layers of one structure are traced and lowered once: inside a jitted model they call one function.
@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: ResidualStream,
    rope: Tables,
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    growth: Float[Array, "B T"] | None,
    cache: LayerCache | None,
    capacity: int | None,
) -> LayerOutput:
    layer = nnx.merge(graph, state)
    # By name, as nnx.tabulate can show what is no array.
    return layer(x=x, rope=rope, start=start, lengths=lengths, growth=growth, cache=cache, capacity=capacity)
