"""ModelConfig: the architecture of a Llama or one of its relatives; ``architectures`` reads it from a config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from fireq_jax.config_fields import Ranges, check_names, check_types, check_values, mapping, quote

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
NormOrder = Literal["pre", "post", "sandwich", "parallel"]
NormKind = Literal["rms", "layer"]
HeadNorms = Literal["none", "before_rope", "after_rope", "across_heads"]
GateActivation = Literal["silu", "gelu_tanh", "clamped_silu"]
ORIGINAL_POSITIONS = "original_max_position_embeddings"
# Beyond any real model, and small enough that indices and positions stay within int32 and rotary frequencies
# and epsilons within float32.
LARGEST_VOCABULARY = 2**24
LARGEST_POSITION = 2**31 - 1
_ROPE_RANGES: Ranges = {
    "theta": (1, 10**15),
    "factor": (1, 2**20),
    ORIGINAL_POSITIONS: (1, LARGEST_POSITION),
    "low_freq_factor": (1e-6, 10**6),
    "high_freq_factor": (1e-6, 10**6),
    "beta_fast": (1e-6, 10**6),
    "beta_slow": (1e-6, 10**6),
    "attention_factor": (1e-3, 10**3),
    "mscale": (0, 10**3),
    "mscale_all_dim": (0, 10**3),
    "short_factor": (1e-6, 10**6),
    "long_factor": (1e-6, 10**6),
    "rotary_dim": (2, 2**12),
}
_EXPERT_RANGES: Ranges = {"count": (1, 2**12), "per_token": (1, 2**12)}
RANGES: Ranges = {
    "vocab_size": (1, LARGEST_VOCABULARY),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_layers": (1, 10_000),
    "num_heads": (1, 2**14),
    "num_kv_heads": (1, 2**14),
    "head_dim": (2, 2**12),
    "head_width": (2, 2**12),
    "max_position_embeddings": (1, LARGEST_POSITION),
    "rms_norm_eps": (1e-30, 0.1),
    "window": (1, LARGEST_POSITION),
    "attention_scale": (1e-6, 10**6),
    "attention_softcap": (1e-3, 10**6),
    "logit_softcap": (1e-3, 10**6),
    "query_growth": (0, 10**3),
    "embedding_scale": (1e-6, 10**6),
    "logit_scale": (1e-6, 10**6),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its context extension (names as in transformers).

    Attributes:
        rope_type: "default", "linear" (positions / factor), "dynamic" (NTK, base grows with the
            sequence), "llama3" (long wavelengths / factor, with a smooth band), "yarn" or "longrope" (a
            factor for each frequency).
        theta: base of the frequencies.
        factor: context extension.
        original_max_position_embeddings: context length of pre-training; None means the model's.
        low_freq_factor, high_freq_factor: "llama3"'s band.
        beta_fast, beta_slow, truncate: "yarn"'s band.
        attention_factor, mscale, mscale_all_dim: "yarn"'s and "longrope"'s factor of cos and sin.
        short_factor, long_factor: "longrope"'s divisors of each frequency, for sequences within and beyond
            ``original_max_position_embeddings``.
        rotary_dim: channels of a head that turn, in pairs (i, i + H/2) from i = 0; None means all.

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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotary_dim: int | None = None

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
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; expected an even number of channels, or None")
        if self.rope_type == "longrope" and not (self.short_factor and len(self.short_factor) == len(self.long_factor)):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} numbers and long_factor {len(self.long_factor)}; "
                "longrope expects one for each frequency"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``rope_parameters`` (v5) or ``rope_theta`` and ``rope_scaling`` (v4) of a config."""
        given = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name) is not None}
        forms = {name: dict(mapping(value, name)) for name, value in given.items()}
        # transformers' order where a config has several forms of it.
        values = forms.get("rope_scaling") or forms.get("rope_parameters") or {}
        if "rope_theta" in fields:
            values.setdefault("rope_theta", fields["rope_theta"])
        values = {name: _tuple(value) for name, value in values.items() if value is not None}
        former = values.pop("type", "default")
        values.setdefault("rope_type", former)
        # What says how a model came about, and what a family reads itself.
        for name in ("finetuned", "partial_rotary_factor", "llama_4_scaling_beta", "max_position_embeddings"):
            values.pop(name, None)
        if fields.get(ORIGINAL_POSITIONS) is not None:
            values[ORIGINAL_POSITIONS] = fields[ORIGINAL_POSITIONS]
        if "rope_theta" in values:
            values["theta"] = values.pop("rope_theta")
        check_values(cls, values, _ROPE_RANGES, {"theta": "rope_theta"})
        if values["rope_type"] in ("su", "longrope"):
            values["rope_type"] = "longrope"
            if (original := values.get(ORIGINAL_POSITIONS)) and (longest := fields.get("max_position_embeddings")):
                values["factor"] = longest / original
        if values["rope_type"] not in ("default", "longrope") and "factor" not in values:
            raise ValueError(f"rope_type {quote(values['rope_type'])} needs a factor; the config gives none")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields by name; unknown keys are errors."""
        check_names(cls, mapping(fields, "rope"), may_lack=True)
        return cls(**{name: _tuple(value) for name, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: MLPs of which each token goes to the few that a linear router likes most.

    Attributes:
        count: experts of a layer.
        per_token: experts that a token goes to.
        normalized: whether the softmax that weighs their outputs is over the chosen experts alone, rather than
            over all.
        router_bias: whether the router adds a number for each expert.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    count: int
    per_token: int
    normalized: bool = True
    router_bias: bool = False

    def __post_init__(self) -> None:
        check_types(self, _EXPERT_RANGES)
        if self.per_token > self.count:
            raise ValueError(f"per_token is {self.per_token}; expected at most {self.count}, the number of experts")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields by name; unknown keys are errors, and so are missing ones."""
        check_names(cls, mapping(fields, "experts"))
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model: Llama's, unless they say otherwise.

    Attributes:
        model_type: the family, by transformers' name.
        intermediate_size: channels between an MLP's matmuls; an expert's, where there are ``experts``.
        head_dim: channels of a head, as it is computed with; need not be ``hidden_size // num_heads``.
        head_width: those that are not padding; None means all. The checkpoint's size of a head.
        rope: of layers that see everything, and of all where ``local_rope`` is None.
        local_rope: of layers with a ``window``.
        rotated: for each layer whether it has RoPE; () means all do.
        window: tokens that a layer sees, itself included; None means all before it.
        windowed: for each layer whether it has the ``window``; () means all do.
        norm_order: norms before attention and MLP ("pre"), after them ("post"), both ("sandwich"), or one
            before both, which are added to the same input ("parallel").
        norm_kind: of these and the last: RMSNorm, or LayerNorm without bias.
        rms_norm_eps: of these norms.
        head_norm: RMSNorm of queries and keys: of each head "before_rope" or "after_rope", or before RoPE
            "across_heads", with one root mean square for all.
        activation: of the gate; "clamped_silu" is gpt-oss's (``matmul_epilogue.clamped_silu_mul``).
        experts: the mixture of experts in place of each layer's MLP; None means an MLP.
        mlp_bias: of the MLP's, or of each expert's, linear layers.
        sinks: whether each head has a score of its own that joins the softmax without a value.
        attention_bias: of q, k and v.
        output_bias: of attention's output.
        attention_scale: factor of the scores; None means width ** -0.5.
        attention_softcap, logit_softcap: c of c * tanh(x / c), of scores and logits.
        query_growth: beta; queries at position p are multiplied by 1 + beta * ln(1 + floor(p / original)).
        embedding_scale: factor of the embeddings, but not of a tied head.
        logit_scale: factor of the logits.
        bos_token_id, pad_token_id: -1 means none, as None does.
        eos_token_ids: every id that ends a sequence.

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
    model_type: str = "llama"
    output_bias: bool = False
    head_width: int | None = None
    local_rope: RopeConfig | None = None
    rotated: tuple[bool, ...] = ()
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    norm_order: NormOrder = "pre"
    norm_kind: NormKind = "rms"
    head_norm: HeadNorms = "none"
    activation: GateActivation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    query_growth: float = 0.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    sinks: bool = False
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        check_types(self, RANGES)
        last = self.vocab_size - 1
        check_types(self, {"bos_token_id": (-1, last), "eos_token_ids": (0, last), "pad_token_id": (-1, last)})
        for name, kind in (("norm_order", NormOrder), ("norm_kind", NormKind), ("head_norm", HeadNorms),
                           ("activation", GateActivation)):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {quote(getattr(self, name))}; expected one of {get_args(kind)}")
        for name in ("rotated", "windowed"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; the model has {self.num_layers} layers"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE expects an even number")
        if self.rope.rope_type == "dynamic" and self.width == 2:
            raise ValueError(
                "head_dim is 2; dynamic RoPE, whose base grows by a power of dim / (dim - 2), expects more"
            )
        if self.width > self.head_dim or self.width % 2:
            raise ValueError(f"head_width is {self.head_width}; expected an even number up to head_dim {self.head_dim}")
        for rope in (self.rope, self.local_rope):
            if rope is not None and rope.rope_type == "longrope":
                pairs = (rope.rotary_dim or self.width) // 2
                if len(rope.short_factor) != pairs:
                    raise ValueError(
                        f"short_factor has {len(rope.short_factor)} numbers; expected one for each of {pairs} pairs"
                    )
            if rope is not None and (rope.rotary_dim or 0) > self.width:
                raise ValueError(f"rotary_dim is {rope.rotary_dim}; expected at most {self.width}, a head's width")

    @property
    def scale(self) -> float:
        """Factor of attention's scores."""
        return self.width**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def width(self) -> int:
        """Channels of a head that are not padding."""
        return self.head_dim if self.head_width is None else self.head_width

    @property
    def ignores_offsets(self) -> bool:
        """Whether attention is the same if one number is added to all scores of a query.

        Not if these are capped, or have a sink beside them.
        """
        return self.attention_softcap is None and not self.sinks

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer sees, itself included; None means all before it."""
        return self.window if not self.windowed or self.windowed[layer] else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """A layer's rotary embedding; None where it has none."""
        if self.rotated and not self.rotated[layer]:
            return None
        return self.rope if self.local_rope is None or self.window_of(layer) is None else self.local_rope

    def first_like(self, layer: int) -> int:
        """The first layer that computes the same function of its parameters."""
        same = (
            i
            for i in range(layer)
            if (self.window_of(i), self.rope_of(i)) == (self.window_of(layer), self.rope_of(layer))
        )
        return next(same, layer)

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(map(self.rope_of, range(self.num_layers))))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self, dict_factory=_plain)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s output; unknown keys are errors, and so are missing ones without a default."""
        values = dict(mapping(fields, "the model's config"))
        check_names(cls, values, may_lack=True)
        values.setdefault("output_bias", values.get("attention_bias", False))
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        if missing := [name for name in (*required, "rope", "eos_token_ids") if name not in values]:
            raise ValueError(f"the model's config lacks {missing[0]}")
        for name, kind in (("eos_token_ids", "whole numbers"), ("rotated", "flags"), ("windowed", "flags")):
            if not isinstance(values.get(name, ()), list | tuple):
                raise ValueError(f"{name} is {quote(values[name])}; expected a list of {kind}")
            values[name] = tuple(values.get(name, ()))
        values["rope"] = RopeConfig.from_dict(values["rope"])
        if values.get("local_rope") is not None:
            values["local_rope"] = RopeConfig.from_dict(values["local_rope"])
        if values.get("experts") is not None:
            values["experts"] = ExpertsConfig.from_dict(values["experts"])
        return cls(**values)


def eos_ids(value: Any) -> tuple[Any, ...]:
    """``eos_token_id`` of a Hugging Face config (an id, several, or null) as ``eos_token_ids``, not checked yet."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _tuple(value: Any) -> Any:
    """A JSON list as a tuple, other values as they are."""
    return tuple(value) if isinstance(value, list) else value


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}
