"""ModelConfig: a Llama's architecture, read from a Hugging Face ``config.json``."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from fireq_jax.config_fields import check_names, check_types, is_a, mapping

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
logger = logging.getLogger(__name__)

_ORIGINAL = "original_max_position_embeddings"


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
        check_types(self)
        if self.rope_type not in get_args(RopeType):
            raise ValueError(f"rope_type is {self.rope_type!r}; expected one of {get_args(RopeType)}")
        if not self.factor > 0 or not self.theta > 0:
            raise ValueError(f"rope theta is {self.theta} and factor {self.factor}; expected positive numbers")
        if self.rope_type == "yarn" and not self.theta > 1:
            raise ValueError(f"rope theta is {self.theta}; YaRN expects more than 1")
        if self.rope_type == "yarn" and not (self.beta_fast > 0 and self.beta_slow > 0):
            raise ValueError(f"beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; expected positive numbers")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "expected low < high"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``rope_parameters`` (v5) or ``rope_theta`` and ``rope_scaling`` (v4) of a config."""
        # transformers' order where a config has several forms of it.
        name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
        values = dict(mapping(fields.get(name) or {}, name))
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in fields:
                values.setdefault(name, fields[name])
        values["rope_type"] = values.pop("rope_type", None) or values.pop("type", None) or "default"
        for name in ("type", "finetuned"):  # the second says how a model came about
            values.pop(name, None)
        if values["rope_type"] in ("llama3", "yarn") and (positions := fields.get(_ORIGINAL)) is not None:
            values[_ORIGINAL] = positions
        if (theta := values.pop("rope_theta", None)) is not None:
            values["theta"] = float(theta) if is_a(theta, float) else theta
        if (partial := values.pop("partial_rotary_factor", None)) not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor is {partial}; only 1.0 is supported")
        if values["rope_type"] != "default" and values.get("factor") is None:
            raise ValueError(f"rope_type {values['rope_type']!r} needs a factor; the config gives none")
        return cls.from_dict({name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields by name; unknown keys are errors."""
        check_names(cls, mapping(fields, "rope"), may_lack=True)
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a Llama model.

    ``eos_token_ids`` holds every id that ends a sequence. ``head_dim`` need not be
    ``hidden_size // num_heads``.
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
        check_types(self)
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}; expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE expects an even number")

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Self:
        """Read a ``config.json`` in transformers' v4 or v5 form.

        Raises:
            ValueError: for another architecture, or an option this model does not have.
        """
        if fields.get("model_type") != "llama":
            raise ValueError(f"model_type is {fields.get('model_type')!r}; expected 'llama'")
        for name, value in _MUST_BE.items():
            if fields.get(name, value) != value:
                raise ValueError(f"{name} is {fields[name]!r}; only {value!r} is supported")
        values = {ours: fields[theirs] for theirs, ours in _NAMES.items() if fields.get(theirs) is not None}
        if missing := [name for name in _REQUIRED if fields.get(name) is None]:
            raise ValueError(f"config.json lacks {missing[0]}")
        for name in ("hidden_size", "num_attention_heads"):
            if not is_a(fields[name], int) or fields[name] < 1:
                raise ValueError(f"{name} is {fields[name]!r}; expected a positive whole number")
        heads = values["num_heads"]
        values.setdefault("num_kv_heads", heads)
        values.setdefault("head_dim", values["hidden_size"] // heads)
        eos = fields.get("eos_token_id")
        values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        values["rope"] = RopeConfig.from_huggingface(fields)
        if ignored := sorted(set(fields) - set(_NAMES) - set(_MUST_BE) - _NO_EFFECT):
            logger.warning("config.json: keys without a meaning here are ignored: %s", ", ".join(ignored))
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
            raise ValueError(f"eos_token_ids is {values['eos_token_ids']!r}; expected a list of whole numbers")
        values["rope"] = RopeConfig.from_dict(values["rope"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**values)


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
    "pad_token_id": "pad_token_id",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MUST_BE = {"hidden_act": "silu", "quantization_config": None, "is_decoder": False, "add_cross_attention": False}
# Read elsewhere (RoPE, EOS), or without effect on inference.
_NO_EFFECT = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "attention_dropout", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", _ORIGINAL, "eos_token_id", "return_dict", "output_hidden_states", "output_attentions",
}  # fmt: skip
