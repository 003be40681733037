"""ModelConfig: a Llama's architecture, read from a Hugging Face ``config.json``."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from fireq_jax.config_fields import Ranges, check_names, check_types, check_values, is_a, mapping, quote

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
logger = logging.getLogger(__name__)

_ORIGINAL = "original_max_position_embeddings"
# Beyond any real model, and small enough that indices and positions stay within int32 and rotary frequencies
# and epsilons within float32.
_LARGEST_VOCABULARY = 2**24
_LARGEST_POSITION = 2**31 - 1
_ROPE_RANGES: Ranges = {
    "theta": (1, 10**15),
    "factor": (1, 2**20),
    _ORIGINAL: (1, _LARGEST_POSITION),
    "low_freq_factor": (1e-6, 10**6),
    "high_freq_factor": (1e-6, 10**6),
    "beta_fast": (1e-6, 10**6),
    "beta_slow": (1e-6, 10**6),
    "attention_factor": (1e-3, 10**3),
    "mscale": (0, 10**3),
    "mscale_all_dim": (0, 10**3),
}
_RANGES: Ranges = {
    "vocab_size": (1, _LARGEST_VOCABULARY),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_layers": (1, 10_000),
    "num_heads": (1, 2**14),
    "num_kv_heads": (1, 2**14),
    "head_dim": (2, 2**12),
    "max_position_embeddings": (1, _LARGEST_POSITION),
    "rms_norm_eps": (1e-30, 0.1),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its context extension (names as in transformers).

    Attributes:
        rope_type: "default", "linear" (positions / factor), "dynamic" (NTK, base grows with the
            sequence), "llama3" (long wavelengths / factor, with a smooth band) or "yarn".
        theta: base of the frequencies.
        factor: context extension.
        original_max_position_embeddings: context length of pre-training; None means the model's.
        low_freq_factor, high_freq_factor: "llama3"'s band.
        beta_fast, beta_slow, truncate: "yarn"'s band.
        attention_factor, mscale, mscale_all_dim: "yarn"'s factor of cos and sin.

    Raises:
        ValueError: for a value of another type, or beyond what any model has.
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        check_types(self, _ROPE_RANGES)
        object.__setattr__(self, "theta", float(self.theta))  # JAX takes no integers beyond 32 bits
        if self.rope_type not in get_args(RopeType):
            raise ValueError(f"rope_type is {quote(self.rope_type)}; expected one of {get_args(RopeType)}")
        if self.rope_type == "default" and self.factor != 1:
            raise ValueError(f"rope factor is {self.factor}, but rope_type is 'default', which extends no context")
        if self.rope_type == "yarn" and not self.theta > 1:
            raise ValueError(f"rope theta is {self.theta}; YaRN expects more than 1")
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; expected fast >= slow")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "expected low < high"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``rope_parameters`` (v5) or ``rope_theta`` and ``rope_scaling`` (v4) of a config."""
        given = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name) is not None}
        forms = {name: dict(mapping(value, name)) for name, value in given.items()}
        # transformers' order where a config has several forms of it.
        values = forms.get("rope_scaling") or forms.get("rope_parameters") or {}
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in fields:
                values.setdefault(name, fields[name])
        values = {name: value for name, value in values.items() if value is not None}
        former = values.pop("type", "default")
        values.setdefault("rope_type", former)
        values.pop("finetuned", None)  # says how a model came about
        if fields.get(_ORIGINAL) is not None:
            values[_ORIGINAL] = fields[_ORIGINAL]
        if "rope_theta" in values:
            values["theta"] = values.pop("rope_theta")
        partial = values.pop("partial_rotary_factor", 1.0)
        if not is_a(partial, float) or partial != 1:
            raise ValueError(f"partial_rotary_factor is {quote(partial)}; only 1.0 is supported")
        if values["rope_type"] != "default" and "factor" not in values:
            raise ValueError(f"rope_type {quote(values['rope_type'])} needs a factor; the config gives none")
        check_values(cls, values, _ROPE_RANGES, {"theta": "rope_theta"})
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields by name; unknown keys are errors."""
        check_names(cls, mapping(fields, "rope"), may_lack=True)
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a Llama model.

    ``eos_token_ids`` holds every id that ends a sequence. A ``bos_token_id`` or ``pad_token_id`` of -1
    means none, as None does. ``head_dim`` need not be ``hidden_size // num_heads``.

    Raises:
        ValueError: for a value of another type, beyond what any model has, or that does not go with the others.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self, _RANGES)
        last = self.vocab_size - 1
        check_types(self, {"bos_token_id": (-1, last), "eos_token_ids": (0, last), "pad_token_id": (-1, last)})
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE expects an even number")
        if self.rope.rope_type == "dynamic" and self.head_dim == 2:
            raise ValueError(
                "head_dim is 2; dynamic RoPE, whose base grows by a power of dim / (dim - 2), expects more"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Self:
        """Read a ``config.json`` in transformers' v4 or v5 form.

        Raises:
            ValueError: for another architecture, or an option this model does not have.
        """
        if fields.get("model_type") != "llama":
            raise ValueError(f"model_type is {quote(fields.get('model_type'))}; expected 'llama'")
        values = {ours: fields[theirs] for theirs, ours in _NAMES.items() if fields.get(theirs) is not None}
        if missing := [name for name in _REQUIRED if fields.get(name) is None]:
            raise ValueError(f"{missing[0]} is missing; expected a whole number")
        values["eos_token_ids"] = eos_ids(fields.get("eos_token_id"))
        check_values(cls, values, _RANGES, {ours: theirs for theirs, ours in _NAMES.items()})
        _check_options(fields, values["num_layers"], values.get("max_position_embeddings", cls.max_position_embeddings))
        heads, hidden = values["num_heads"], values["hidden_size"]
        values.setdefault("num_kv_heads", heads)
        if "head_dim" not in values:
            if hidden % heads:
                raise ValueError(f"hidden_size is {hidden}; expected a multiple of num_attention_heads {heads}")
            values["head_dim"] = hidden // heads
        for name in ("bos_token_id", "pad_token_id"):
            # Of a token that was added to the tokenizer alone; nothing is ever computed from it.
            if values["vocab_size"] <= values.get(name, -1) < _LARGEST_VOCABULARY:
                logger.warning("config.json: %s is %d, beyond the vocabulary: taken as none", name, values.pop(name))
        values["rope"] = RopeConfig.from_huggingface(fields)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads them back."""
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s output; unknown keys are errors."""
        values = dict(mapping(fields, "the model's config"))
        check_names(cls, values)
        if not isinstance(values["eos_token_ids"], list | tuple):
            raise ValueError(f"eos_token_ids is {quote(values['eos_token_ids'])}; expected a list of whole numbers")
        values["rope"] = RopeConfig.from_dict(values["rope"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**values)


def eos_ids(value: Any) -> tuple[Any, ...]:
    """``eos_token_id`` of a Hugging Face config (an id, several, or null) as ``eos_token_ids``, not checked yet."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _check_options(fields: Mapping[str, Any], num_layers: int, positions: int) -> None:
    """Raise ValueError for what changes transformers' results and is not here; name in the log what is unknown."""
    for name, accepted in _ACCEPTED.items():
        if fields.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name} is {quote(fields[name])}; only {quote(accepted[0])} is supported")
    layers = fields.get("layer_types")
    if layers is not None and layers != ["full_attention"] * num_layers:
        raise ValueError(f"layer_types is {quote(layers)}; expected 'full_attention' for each of {num_layers} layers")
    # Where layer_types do not say otherwise, transformers' cache forgets what is further away than that.
    for name in _WINDOWS if layers is None else ():
        window = fields.get(name)
        if window is not None and not (is_a(window, int) and positions <= window <= _LARGEST_POSITION):
            raise ValueError(f"{name} is {quote(window)}; only attention to all {positions} positions is supported")
    if ignored := sorted(set(fields) - set(_NAMES) - set(_ACCEPTED) - set(_WINDOWS) - _NO_EFFECT):
        logger.warning("config.json: keys without a meaning here are ignored: %s", ", ".join(ignored))


# transformers' name -> ours.
_NAMES = {
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
# Options of transformers' Llama, or of its caches, masks and loading: the values that mean what this model does.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (None, False),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "transformers_weights": (None,),
}
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Read elsewhere (RoPE), or without effect on inference.
_NO_EFFECT = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", _ORIGINAL, "return_dict", "output_hidden_states", "output_attentions", "layer_types",
    "is_decoder",
}  # fmt: skip
