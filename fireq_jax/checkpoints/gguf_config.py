"""What a GGUF file's metadata says of a model, as the config.json that it was made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.gguf_file import GGUFFile
from fireq_jax.config_fields import is_a, quote
from fireq_jax.models.architectures import tensor_table
from fireq_jax.models.config import ORIGINAL_POSITIONS, ModelConfig
from fireq_jax.models.tensor_source import TensorSource, TensorTable

Fields = dict[str, Any]

# A model's key, after its architecture's name -> config.json's.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.causal": "is_causal",
    "vocab_size": "vocab_size",
}
# Read here in other ways, or of no meaning for what is computed.
_READ = {
    "attention.value_length", "expert_count", "expert_used_count", "tensor_data_layout", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"
# Tokens that end a turn, which chat models write in place of what ends a text.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CONTROL = 3  # among token_type


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One ``general.architecture``.

    Attributes:
        model_type: the family's name in config.json.
        keys: keys of its own, which must be there -> config.json's.
        turned: whether rows of q and k are in the order of rotary pairs (2i, 2i + 1), in place of the checkpoint's.
    """

    model_type: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    turned: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", turned=True),
    "granite": Architecture(
        "granite",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        turned=True,
    ),
}


def config_fields(file: GGUFFile) -> tuple[Fields, list[str]]:
    """The model's config.json, and those of the file's keys about it that have no meaning here.

    Raises:
        ValueError: for an architecture that is not there, or what it does not have here.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {quote(name)}; expected one of {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[name]
    said = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    if missing := [key for key in (*_REQUIRED, *architecture.keys) if key not in said]:
        raise ValueError(f"{name}.{missing[0]} is missing; expected a number")
    if said.get("expert_count"):
        raise ValueError(f"{name}.expert_count is {quote(said['expert_count'])}; only models without are supported")
    keys = {**_KEYS, **architecture.keys}
    fields = {theirs: _one(f"{name}.{key}", said[key]) for key, theirs in keys.items() if key in said}
    fields["model_type"] = architecture.model_type
    for key in ("embedding_length", "attention.head_count"):
        if not is_a(value := fields[keys[key]], int) or value < 1:
            raise ValueError(f"{name}.{key} is {quote(value)}; expected a positive whole number")
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    if said.get("attention.value_length", fields["head_dim"]) != fields["head_dim"]:
        raise ValueError(
            f"{name}.attention.value_length is {quote(said['attention.value_length'])}; "
            f"expected {fields['head_dim']}, as of keys"
        )
    if (tokens := _listed(file, "tokens")) is not None:
        fields["vocab_size"] = len(tokens)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    fields["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    fields |= {**_rope(name, said, file, fields["head_dim"]), **_special_ids(file)}
    return fields, sorted(set(said) - {*keys, *_READ})


def _one(key: str, value: Any) -> Any:
    """The value that all layers have."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key} is {quote(value)}; expected the same for all layers")
    return value[0]


def _rope(name: str, said: Fields, file: GGUFFile, head_dim: int) -> Fields:
    fields: Fields = {"rope_theta": said.get("rope.freq_base", 10000.0)}
    turned = said.get("rope.dimension_count", head_dim)
    if not (is_a(turned, int) and is_a(head_dim, int) and 0 < turned <= head_dim):
        raise ValueError(f"{name}.rope.dimension_count is {quote(turned)}; expected at most the {head_dim} of a head")
    if turned != head_dim:
        fields["partial_rotary_factor"] = turned / head_dim
    kind, factor = said.get("rope.scaling.type"), said.get("rope.scaling.factor")
    if kind is None and (linear := said.get("rope.scale_linear")) is not None:
        kind, factor = "linear", linear
    scaling: Fields = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {
            ORIGINAL_POSITIONS: said.get("rope.scaling.original_context_length"),
            "beta_fast": said.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": said.get("rope.scaling.yarn_beta_slow"),
        }
    elif kind not in (None, "none", "linear"):
        raise ValueError(f"{name}.rope.scaling.type is {quote(kind)}; expected 'none', 'linear' or 'yarn'")
    scaled = kind in ("linear", "yarn")
    if scaled and (odd := sorted(key for key in set(said) - _READ if key.startswith("rope.scaling."))):
        raise ValueError(f"{name}.{odd[0]} is {quote(said[odd[0]])}; expected none, as it is not computed here")
    if _ROPE_FACTORS in file.tensors:
        if scaled:
            raise ValueError(f"{name}.rope.scaling.type is {quote(kind)} beside {_ROPE_FACTORS}; expected one of them")
        # LongRoPE with the same factors at any length, and no other of cos and sin.
        factors = [float(each) for each in np.asarray(_factors(file, turned // 2), np.float32)]
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    elif not scaled:
        return fields
    return {**fields, "rope_scaling": {key: value for key, value in scaling.items() if value is not None}}


def _factors(file: GGUFFile, pairs: int) -> np.ndarray:
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.shape != (pairs,):
        raise ValueError(f"tensor {tensor.name} in {tensor.path} has shape {tensor.shape}; expected {(pairs,)}")
    return tensor.read()


def _listed(file: GGUFFile, name: str) -> list[Any] | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, list):
        raise ValueError(f"tokenizer.ggml.{name} is {quote(value)}; expected a list, with an entry for each token")
    return value


def _special_ids(file: GGUFFile) -> Fields:
    """Ids of tokens with a meaning. What ends a turn ends the text, whether the file says so or not."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    ends = [said[key] for key in _END_KEYS if key in said]
    if odd := [value for value in ends if not is_a(value, int)]:
        raise ValueError(f"{_END_KEYS[0]} or another of its kind is {quote(odd[0])}; expected a whole number")
    kinds = zip(_listed(file, "tokens") or (), _listed(file, "token_type") or (), strict=False)
    ends += [index for index, (token, kind) in enumerate(kinds) if kind == _CONTROL and token in _TURN_ENDS]
    fields = {"bos_token_id": said.get("bos_token_id"), "pad_token_id": said.get("padding_token_id")}
    return {**fields, "eos_token_id": list(dict.fromkeys(ends)) or None}


def gguf_table(name: str, fields: Fields, config: ModelConfig, names: Mapping[str, str]) -> TensorTable:
    """Where the file of architecture ``name`` has the tensors of ``config``.

    Args:
        name: of ``ARCHITECTURES``.
        fields: its config.json.
        config: what was read of that.
        names: a checkpoint's names without ".weight" or ".bias", block 0's of those that blocks have -> the file's.
    """
    table = tensor_table(fields, config)
    order = _pairs_apart(config) if ARCHITECTURES[name].turned else None
    prefix = table.prefix.format(index=0)

    def renamed(source: TensorSource, before: str, after: str) -> TensorSource:
        stem, _, kind = source.name.rpartition(".")
        return dataclasses.replace(source, name=f"{names[before + stem].removeprefix(after)}.{kind}")

    block = {ours: renamed(source, prefix, "blk.0.") for ours, source in table.block.items()}
    for ours, source in block.items():
        if order is not None and ours.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
            rows = np.arange(source.shape[0]) if source.rows is None else source.rows
            heads = source.shape[0] // config.width
            places = (order + config.width * np.arange(heads)[:, None]).reshape(-1)
            block[ours] = dataclasses.replace(source, rows=np.where(rows < 0, -1, places[rows]))
    outside = {ours: renamed(source, "", "") for ours, source in table.outside.items()}
    return TensorTable("blk.{index}.", block, outside)


def _pairs_apart(config: ModelConfig) -> np.ndarray:
    """The file's row of each of a head's rows [H] in the checkpoint, whose pairs are (i, i + H/2)."""
    return np.arange(config.width).reshape(-1, 2).T.reshape(-1)
