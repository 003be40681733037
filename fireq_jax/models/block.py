"""What a decoder block is made of: its tensors as checkpoints hold them, and its linear layers as the model does.

A block's weights are a dict by name without the layer prefix (``self_attn.q_proj.weight`` ...), [out, in] each, in
the one form that every family is brought to when it is read (``architectures``):

- queries and keys have rotary pairs (i, i + H/2), and all heads ``config.head_dim`` channels;
- ``input_layernorm`` and ``post_attention_layernorm`` come before attention and the MLP, ``attention_output_norm``
  and ``mlp_output_norm`` after them; a family has some of these (``config.norm_order``);
- a mixture of experts has ``mlp.router.weight`` [experts, D], and ``mlp.experts.gate_proj.weight`` [experts, I, D]
  and the like in place of ``mlp.gate_proj.weight`` [I, D] (``config.experts``);
- ``self_attn.q_norm`` [heads, H] and ``self_attn.k_norm`` [kv_heads, H] are norms of each head (``config.head_norm``);
- gains are what rows are multiplied by.

The model holds q, k, v as one matrix, and gate and up interleaved as another.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fireq_jax.models.coded_weight import BlockTensor, CodedWeight, HostTensor, joined
from fireq_jax.models.config import ModelConfig
from pallas_kernels import layouts

Block = Mapping[str, Array]
TensorT = TypeVar("TensorT", Array, BlockTensor)


@dataclasses.dataclass(frozen=True)
class FusedLinear:
    """A linear layer of the model, or one that every expert of a layer has.

    Attributes:
        name: in a decoder layer.
        parts: the checkpoint's linear layers that it computes in one.
        input: what calibration calls its input.
        norm: the norm that its input comes out of in families that have it, or None.
        routed: whether every expert has its own, for tokens of its own.
    """

    name: str
    parts: tuple[str, ...]
    input: str
    norm: str | None = None
    routed: bool = False


def linears_of(config: ModelConfig) -> tuple[FusedLinear, ...]:
    """The linear layers of a block, in the order in which data walks through them."""
    mlp, routed = mlp_name(config), config.experts is not None
    return (
        FusedLinear(
            "self_attn.qkv_proj",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "qkv_input",
            "input_layernorm",
        ),
        FusedLinear("self_attn.o_proj", ("self_attn.o_proj",), "o_input"),
        FusedLinear(
            f"{mlp}.gate_up_proj",
            (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            "gate_up_input",
            "post_attention_layernorm",
            routed,
        ),
        FusedLinear(f"{mlp}.down_proj", (f"{mlp}.down_proj",), "down_input", routed=routed),
    )


def mlp_name(config: ModelConfig) -> str:
    """What names of the MLP's, or of the experts', tensors begin with."""
    return "mlp" if config.experts is None else "mlp.experts"


# Parameters of a layer that are float32 whatever the model's dtype.
FLOAT32 = ("norm", "post_rope_scale", "key_offset", "sinks", "router")


def norm_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms [D] of a block."""
    return {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "post": ("attention_output_norm", "mlp_output_norm"),
        "sandwich": ("input_layernorm", "attention_output_norm", "post_attention_layernorm", "mlp_output_norm"),
        "parallel": ("input_layernorm",),
    }[config.norm_order]


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a block."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norm_names(config)}
    if config.head_norm != "none":
        shapes["self_attn.q_norm"] = (config.num_heads, config.head_dim)
        shapes["self_attn.k_norm"] = (config.num_kv_heads, config.head_dim)
    if config.sinks:
        shapes["self_attn.sinks"] = (config.num_heads,)
    stack: tuple[int, ...] = ()
    if config.experts is not None:
        stack = (config.experts.count,)
        shapes["mlp.router.weight"] = (*stack, hidden)
        if config.experts.router_bias:
            shapes["mlp.router.bias"] = stack
    mlp = mlp_name(config)
    for name, size, bias in (
        ("self_attn.q_proj", (queries, hidden), config.attention_bias),
        ("self_attn.k_proj", (keys, hidden), config.attention_bias),
        ("self_attn.v_proj", (keys, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, queries), config.output_bias),
        (f"{mlp}.gate_proj", (*stack, inner, hidden), config.mlp_bias),
        (f"{mlp}.up_proj", (*stack, inner, hidden), config.mlp_bias),
        (f"{mlp}.down_proj", (*stack, hidden, inner), config.mlp_bias),
    ):
        shapes[f"{name}.weight"] = size
        if bias:
            shapes[f"{name}.bias"] = size[:-1]
    return shapes


def global_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor outside the blocks."""
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": embedding, "norm.weight": (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else {**shapes, "lm_head": embedding}


def linear_names(config: ModelConfig) -> list[str]:
    """Names of all linear layers, as ``QuantizationConfig.keep_float`` matches them."""
    return [f"layers.{i}.{linear.name}" for i in range(config.num_layers) for linear in linears_of(config)]


def fuse_block(block: Mapping[str, TensorT]) -> dict[str, TensorT]:
    """The parameters of a layer as a block holds them, but for qkv and gate/up, which are fused.

    Codes stay codes where all parts of a linear layer are coded alike.
    """
    fused: dict[str, TensorT] = {}
    for name, tensor in block.items():
        if ".q_proj." in name:
            parts = [block[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused[name.replace(".q_proj.", ".qkv_proj.")] = joined(parts, _concatenate)
        elif ".gate_proj." in name:
            up = block[name.replace(".gate_proj.", ".up_proj.")]
            interleave = jax.vmap(layouts.interleave_gate_up) if ".experts." in name else layouts.interleave_gate_up
            fused[name.replace(".gate_proj.", ".gate_up_proj.")] = joined((tensor, up), interleave)
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = tensor
    return fused


def split_block(fused: Mapping[str, HostTensor], config: ModelConfig) -> dict[str, HostTensor]:
    """The inverse of :func:`fuse_block`, on the host."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    ends = np.cumsum([heads, kv_heads, kv_heads]) * config.head_dim
    qkv = dict(zip("qkv", np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    inner = config.intermediate_size
    gate, up = layouts.split_gate_up(jnp.arange(layouts.interleaved_rows(inner)))
    both = {"gate": np.asarray(gate)[:inner], "up": np.asarray(up)[:inner]}
    split: dict[str, HostTensor] = {}
    for name, tensor in fused.items():
        whole = next((whole for whole in ("qkv", "gate_up") if f".{whole}_proj." in name), None)
        if whole is None:
            split[name] = tensor
            continue
        for part, rows in (qkv if whole == "qkv" else both).items():
            axis = int(".experts." in name)
            taken = tensor.take_rows(rows) if isinstance(tensor, CodedWeight) else np.take(tensor, rows, axis)
            split[name.replace(f".{whole}_proj.", f".{part}_proj.")] = taken
    return split


def _concatenate(*arrays: Array) -> Array:
    return jnp.concatenate(arrays)
