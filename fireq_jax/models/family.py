"""How a family's ``config.json`` becomes a ``ModelConfig``, and its checkpoints' tensors this project's blocks."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from fireq_jax.config_fields import check_values, is_a, mapping, quote
from fireq_jax.models.block import block_shapes, global_shapes, norm_names
from fireq_jax.models.config import (
    LARGEST_POSITION,
    LARGEST_VOCABULARY,
    ORIGINAL_POSITIONS,
    RANGES,
    ModelConfig,
    RopeConfig,
    eos_ids,
)
from fireq_jax.models.tensor_source import TensorSource, TensorTable

Fields = Mapping[str, Any]
logger = logging.getLogger(__name__)

# The one name that checkpoints of all families give the head.
HEAD = "lm_head.weight"
_SLIDING = "sliding_attention"

# transformers' name -> ours.
NAMES = {
    "model_type": "model_type",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_ids",
    "pad_token_id": "pad_token_id",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COMMON: Fields = {"hidden_act": "silu"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Options of transformers' models, or of its caches, masks and loading: the values that mean what this project does.
_ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (False, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "transformers_weights": (None,),
}
# Read elsewhere (activation, RoPE, EOS, quantized formats), or without effect on inference.
_NO_EFFECT = {
    "hidden_act", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "original_max_position_embeddings", "eos_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "is_decoder", "quantization_config", "compression_config",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        defaults: keys of its own, and values of common ones that a config.json may lack.
        aliases: its name of a key -> the common one.
        options: further fields of ``ModelConfig``, from the config's.
        names: this project's name of a block's tensor -> the checkpoint's, where they differ.
        prefix: of a block's tensors in the checkpoint.
        globals: this project's name of a tensor outside the blocks -> the checkpoint's.
        fused_qkv, fused_gate_up: whether the checkpoint holds these as one tensor.
        stacked_experts: whether it holds all experts' gates and ups as one tensor [experts, D, 2 I], in turns, and
            all their downs as another [experts, I, D]; else ``names`` have "{expert}" in them.
        interleaved_rope: whether its rotary pairs are (2i, 2i + 1).
        gain_offset: what is added to its norms' weights.
        partial_rope: whether only some channels of a head may turn.
        plain_local_rope: whether a context extension is of layers without a window only.
    """

    defaults: Fields = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = "model.layers.{index}."
    globals: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "embed_tokens": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "lm_head": HEAD,
        }
    )
    fused_qkv: bool = False
    fused_gate_up: bool = False
    stacked_experts: bool = False
    interleaved_rope: bool = False
    gain_offset: float = 0.0
    partial_rope: bool = False
    plain_local_rope: bool = False


class HasFields(Protocol):
    """A config object of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as a config.json has them."""
        ...


def fields_of(config: Fields | HasFields) -> Fields:
    """The fields of a config of transformers.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(config, Mapping):
        return config
    if not hasattr(config, "to_dict"):
        raise ValueError(f"config is a {type(config).__name__}; expected a config of transformers, or its fields")
    return config.to_dict()


def config_of(family: Family, fields: Fields) -> ModelConfig:
    """Read a ``config.json`` of the family in transformers' v4 or v5 form.

    Raises:
        ValueError: for an option that this project does not have, or a field out of range.
    """
    fields = _completed(family, fields)
    values = {ours: fields[theirs] for theirs, ours in NAMES.items() if fields.get(theirs) is not None}
    if missing := [name for name in _REQUIRED if fields.get(name) is None]:
        raise ValueError(f"{missing[0]} is missing; expected a whole number")
    values["eos_token_ids"] = eos_ids(fields.get("eos_token_id"))
    check_values(ModelConfig, values, RANGES, {ours: theirs for theirs, ours in NAMES.items()})
    _check_options(family, fields, values)
    heads, hidden = values["num_heads"], values["hidden_size"]
    values.setdefault("num_kv_heads", heads)
    if "head_dim" not in values and hidden % heads:
        raise ValueError(f"hidden_size is {hidden}; expected a multiple of num_attention_heads {heads}")
    for name in ("bos_token_id", "pad_token_id"):
        # Of a token that was added to the tokenizer alone; nothing is ever computed from it.
        if values["vocab_size"] <= values.get(name, -1) < LARGEST_VOCABULARY:
            logger.warning("config.json: %s is %d, beyond the vocabulary: taken as none", name, values.pop(name))
    values["output_bias"] = values.get("attention_bias", False)
    values |= family.options(fields)
    if "activation" not in values:
        values["activation"] = _activation(fields["hidden_act"])
    if "rope" not in values:
        values |= _ropes(family, fields)
    values |= _heads(fields)
    return ModelConfig(**values)


def _check_options(family: Family, fields: Fields, values: Fields) -> None:
    """Raise ValueError for what changes transformers' results and is not here; name in the log what is unknown."""
    for name, accepted in _ACCEPTED.items():
        if fields.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name} is {quote(fields[name])}; only {quote(accepted[0])} is supported")
    known = {*NAMES, *_ACCEPTED, *_NO_EFFECT, *family.defaults, *family.aliases}
    if "sliding_window" not in family.defaults:
        _check_sees_everything(fields, values)
        known |= {"sliding_window", "layer_types"}
    if ignored := sorted(set(fields) - known):
        logger.warning("config.json: keys without a meaning here are ignored: %s", ", ".join(ignored))


def _check_sees_everything(fields: Fields, values: Fields) -> None:
    """Of a family without windows: transformers' cache would forget what is further away than one."""
    layers, count = fields.get("layer_types"), values["num_layers"]
    if layers is not None and layers != ["full_attention"] * count:
        raise ValueError(f"layer_types is {quote(layers)}; expected 'full_attention' for each of {count} layers")
    window, positions = fields.get("sliding_window"), values.get("max_position_embeddings", 2048)
    if layers is None and window is not None and not (is_a(window, int) and positions <= window <= LARGEST_POSITION):
        raise ValueError(f"sliding_window is {quote(window)}; only attention to all {positions} positions is supported")


def tensors_of(family: Family, fields: Fields, config: ModelConfig) -> TensorTable:
    """Where a checkpoint of the family with this config.json has the tensors of ``config``, and how they are read."""
    fields = _completed(family, fields)
    channels = _channels(config, interleaved=family.interleaved_rope)
    plain = _padded(np.arange(config.width), config.head_dim)
    block = {
        name: _source(name, shape, family, fields, config, channels, plain)
        for name, shape in block_shapes(config).items()
    }
    outside = {
        name: TensorSource(family.globals[name], shape, offset=family.gain_offset if "norm" in name else 0.0)
        for name, shape in global_shapes(config).items()
    }
    return TensorTable(family.prefix, block, outside)


def _completed(family: Family, fields: Fields) -> dict[str, Any]:
    """The config's fields with the family's defaults, by common names."""
    renamed = {common: fields[own] for own, common in family.aliases.items() if fields.get(own) is not None}
    return {**_COMMON, **family.defaults, **fields, **renamed}


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {quote(name)}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


# --- sizes and rotary embeddings ------------------------------------------------------------------


def head_dim_of(fields: Fields) -> int:
    """Channels of a head in the checkpoint."""
    given = fields.get("head_dim")
    if given is None:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return given


def _heads(fields: Fields) -> dict[str, int]:
    """Sizes of heads: those that kernels lack are padded with channels that are 0."""
    real = head_dim_of(fields)
    padded = next((size for size in (128, 256) if size // 2 < real < size), None)
    return {"head_dim": real} if padded is None else {"head_dim": padded, "head_width": real}


def _ropes(family: Family, fields: Fields) -> dict[str, Any]:
    """``rope``, and ``local_rope`` where a config has another one for layers with a window."""
    parameters = fields.get("rope_parameters")
    by_layer = isinstance(parameters, Mapping) and ("full_attention" in parameters or _SLIDING in parameters)
    # Of a family that has it, and to others a key without a meaning.
    local_theta = fields["rope_local_base_freq"] if "rope_local_base_freq" in family.defaults else None
    if local_theta is None:
        local_theta = fields.get("rope_theta")
    else:
        family = dataclasses.replace(family, plain_local_rope=True)
    if not by_layer:
        rope = _rope(family, fields, fields)
        if not family.plain_local_rope:
            return {"rope": rope}
        return {"rope": rope, "local_rope": _rope(family, fields, {"rope_theta": local_theta})}
    assert isinstance(parameters, Mapping)
    if odd := sorted(set(parameters) - {"full_attention", _SLIDING}):
        raise ValueError(f"rope_parameters has {quote(odd[0])} beside layers' own; expected nothing else")

    def of_kind(kind: str, theta: float | None) -> RopeConfig:
        own = mapping({} if parameters.get(kind) is None else parameters[kind], f"rope_parameters.{kind}")
        return _rope(family, fields, {"rope_parameters": {"rope_theta": theta, **own}})

    full = of_kind("full_attention", fields.get("rope_theta"))
    return {"rope": full, "local_rope": of_kind(_SLIDING, local_theta)}


def _rope(family: Family, fields: Fields, own: Fields) -> RopeConfig:
    """The rotary embedding that ``own`` describes in a model of ``fields``."""
    partial = rope_parameters(own).get("partial_rotary_factor")
    partial = fields.get("partial_rotary_factor", 1.0) if partial is None else partial
    if not is_a(partial, float) or not 0 < partial <= 1 or (partial < 1 and not family.partial_rope):
        expected = "more than 0 and at most 1" if family.partial_rope else "1.0 for this model_type"
        raise ValueError(f"partial_rotary_factor is {quote(partial)}; expected {expected}")
    real = head_dim_of(fields)
    dim = int(real * partial)
    rope = RopeConfig.from_huggingface({**own, ORIGINAL_POSITIONS: fields.get(ORIGINAL_POSITIONS)})
    return dataclasses.replace(rope, rotary_dim=dim) if dim != real else rope


def rope_parameters(fields: Fields) -> Fields:
    """What a config says of RoPE, in either of its forms."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return mapping(fields.get(name) or {}, name)


def positive(fields: Fields, name: str) -> float:
    """A positive number of a config.

    Raises:
        ValueError: if it is something else.
    """
    if not is_a(fields.get(name), float) or not 0 < fields[name] < LARGEST_POSITION:
        raise ValueError(f"{name} is {quote(fields.get(name))}; expected a positive number that a model may have")
    return float(fields[name])


def window_layers(fields: Fields, otherwise: Callable[[int], bool]) -> dict[str, Any]:
    """The window, and which layers have it: as ``layer_types`` says, or else as ``otherwise`` says by index.

    There is none where a family that asks for ``use_sliding_window`` is not asked.
    """
    window, count, kinds = fields.get("sliding_window"), fields["num_hidden_layers"], fields.get("layer_types")
    if not is_a(used := fields.get("use_sliding_window", True), bool):
        raise ValueError(f"use_sliding_window is {quote(used)}; expected true or false")
    if window is not None and (not is_a(window, int) or not 1 <= window <= LARGEST_POSITION):
        raise ValueError(f"sliding_window is {quote(window)}; expected a positive number of tokens, or null")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != count):
        raise ValueError(f"layer_types is {quote(kinds)}; expected a list of {count} names")
    if kinds is not None and (odd := [kind for kind in kinds if kind not in (_SLIDING, "full_attention")]):
        raise ValueError(f"layer_types has {quote(odd[0])}; expected {quote(_SLIDING)} or 'full_attention'")
    if window is None or not used:
        return {}
    windowed = tuple(otherwise(i) if kinds is None else kinds[i] == _SLIDING for i in range(count))
    return {} if not any(windowed) else {"window": window, "windowed": () if all(windowed) else windowed}


def all_but_every(period: Any) -> Callable[[int], bool]:
    """All layers but each ``period``-th."""
    if not is_a(period, int) or period < 1:
        raise ValueError(f"the pattern of layers with a window is {quote(period)}; expected a positive whole number")
    return lambda i: (i + 1) % period != 0


# --- tensors ----------------------------------------------------------------------------------------


def _padded(order: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([order, np.full(size - len(order), -1)])


def _channels(config: ModelConfig, *, interleaved: bool) -> np.ndarray:
    """The checkpoint's channel of each of a head's channels [H] in our order of pairs (i, i + H/2); -1 for padding."""
    turned = (config.rope.rotary_dim or config.width) // 2
    pairs = (np.arange(2 * turned).reshape(-1, 2).T if interleaved else np.arange(2 * turned).reshape(2, -1)).tolist()
    still = np.arange(2 * turned, config.width).reshape(2, -1)
    half = config.head_dim // 2
    return np.concatenate([_padded(np.concatenate([pairs[i], still[i]]), half) for i in range(2)]).astype(int)


def _source(
    name: str,
    shape: tuple[int, ...],
    family: Family,
    fields: Fields,
    config: ModelConfig,
    channels: np.ndarray,
    plain: np.ndarray,
) -> TensorSource:
    """Where a block's tensor is, and what is done to it."""
    real, hidden, inner = config.width, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads, config.num_kv_heads
    stem, _, kind = name.rpartition(".")
    theirs = f"{family.names.get(stem, stem)}.{kind}"
    if stem in norm_names(config):
        return TensorSource(theirs, shape, offset=family.gain_offset)
    part = stem.split(".")[-1].removesuffix("_proj")
    if name in ("self_attn.q_norm", "self_attn.k_norm"):
        return _head_norm(name, shape, family, config, channels)
    if ".experts." in name:
        return _of_experts(theirs, part, kind, shape, stacked=family.stacked_experts)
    if part in ("q", "k", "v"):
        count = heads if part == "q" else kv_heads
        rows = _of_heads(plain if part == "v" else channels, count, real)
        total = count
        if family.fused_qkv:
            theirs, total = f"self_attn.qkv_proj.{kind}", heads + 2 * kv_heads
            rows = np.where(rows < 0, -1, rows + real * {"q": 0, "k": heads, "v": heads + kv_heads}[part])
        return TensorSource(theirs, (total * real, *shape[1:]), rows=rows)
    if part in ("gate", "up") and family.fused_gate_up:
        rows = np.arange(inner) + (inner if part == "up" else 0)
        return TensorSource(f"mlp.gate_up_proj.{kind}", (2 * inner, *shape[1:]), rows=rows)
    multiplied = part in ("o", "down") and "residual_multiplier" in family.defaults
    scale = positive(fields, "residual_multiplier") if multiplied else 1.0
    if part == "o" and kind == "weight":
        return TensorSource(theirs, (hidden, heads * real), columns=_of_heads(plain, heads, real), scale=scale)
    return TensorSource(theirs, shape, scale=scale)


def _head_norm(
    name: str, shape: tuple[int, ...], family: Family, config: ModelConfig, channels: np.ndarray
) -> TensorSource:
    """A gain for each head, whether the checkpoint has one for each or one for all."""
    theirs = f"{family.names.get(name, name)}.weight"
    real, each = config.width, config.head_norm == "across_heads"
    rows = _of_heads(channels, shape[0], real if each else 0)
    size = (shape[0] * real,) if each else (real,)
    return TensorSource(theirs, size, rows=rows, offset=family.gain_offset, reshaped=shape)


def _of_experts(theirs: str, part: str, kind: str, shape: tuple[int, ...], *, stacked: bool) -> TensorSource:
    """A linear layer's tensor of all experts: one of the checkpoint's for each, unless it holds them ``stacked``."""
    count, *each = shape
    if not stacked:
        return TensorSource(theirs, tuple(each), stack=count)
    rows = None
    if part in ("gate", "up"):
        rows, each[0] = 2 * np.arange(each[0]) + (part == "up"), 2 * each[0]
    stem = f"mlp.experts.{'down' if part == 'down' else 'gate_up'}_proj"
    if kind == "bias":
        return TensorSource(f"{stem}_bias", (count, *each), rows=rows, stack=count)
    return TensorSource(stem, (count, *reversed(each)), rows=rows, stack=count, transposed=True)


def _of_heads(channels: np.ndarray, heads: int, step: int) -> np.ndarray:
    """``channels`` of each head, ``step`` apart."""
    rows = channels + step * np.arange(heads)[:, None]
    return np.where(channels < 0, -1, rows).reshape(-1)
