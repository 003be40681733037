"""QuantizationConfig: every choice that turns a float model into a quantized one."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

from fireq_jax.config_fields import check_kinds, check_names, check_types, mapping, pairs, quote
from fireq_jax.quantization.layer_patterns import (
    Choices,
    as_choices,
    as_patterns,
    check_choices,
    check_patterns,
    chosen,
    matches,
)
from pallas_kernels import formats
from pallas_kernels.codebooks import own_codebooks, register_codebook

WeightFormat = formats.Codebook | Literal["fp8", "none"]
ActivationFormat = Literal["fp8", "none"]
CalibrationStream = Literal["float", "quantized"]
ColumnStatistic = Literal["mean", "max"]
PairStatistic = Literal["max", "rms"]
ValueBasis = Literal["channels", "hadamard", "balanced"]
ResidualBasis = Literal["channels", "hadamard"]


def weight_formats() -> tuple[WeightFormat, ...]:
    """All formats of weights that there are, those of registered codebooks too."""
    return (*formats.CODEBOOKS, "fp8", "none")


# Of alpha and beta: far from where the keys' scales leave bfloat16 and float32.
_KEY_SIZES = 1e-6, 1e6
_MOST_STEPS = 1_000_000
# Fields that models of earlier versions do not have.
_LATER = "layer_formats", "layer_kv_formats", "codebooks"


@dataclasses.dataclass(frozen=True)
class SmoothingConfig:
    """Function-preserving rescaling before rounding (FireQ, channel-wise and RoPE-aware scaling).

    Attributes:
        residual_basis: the residual stream's channels as they are, or rotated by random signs and a "hadamard"
            matrix, which is folded into every layer that writes to the stream or reads from it. A tied head that
            stays float has a [D, D] matrix before it, which takes the last norm's gain. Not in models with norms after
            their branches, or with LayerNorm.
        qkv_input: balance the columns of q/k/v_proj against the norm's gain before them, if there is one; where
            gate/up_proj read the same norm, together with theirs.
        value_output: balance v_proj rows against o_proj columns (Lambda1).
        gate_up_input: balance gate/up_proj columns against the gain of a norm of their own before them (Lambda2).
        up_down: balance up_proj rows against down_proj columns (Lambda3); not in models whose activation is clamped,
            which is not proportional to up.
        column_statistic: what is balanced: the mean or the largest magnitude of a weight column.
        pre_rope: N: equalise rotary pairs of the keys; folded into q_proj and k_proj, or into the gains of a norm of
            each head.
        alpha: largest pair norm of a key after N.
        post_rope_channels: S: this many outlier channels a kv head (with their pair partners)
            are scaled after RoPE, online; those pairs keep N = 1. 0 turns S off.
        beta: largest magnitude of such a channel after S.
        activation_exponent: balance columns by their inputs as well: a factor is
            inputs**exponent / weights**(1 - exponent). 0 looks at the weights alone.
        pair_statistic: what N looks at: the "max" norm of each rotary pair of the keys, or its
            "rms", as deviation from ``key_offset`` where that is on.
        query_exponent: let N favour the pairs that queries read most:
            queries**exponent / keys**(1 - exponent). 0 flattens the keys whatever reads them.
        key_offset: store keys minus their mean after RoPE, by channel. Scores of a query then all
            change by the same number, which softmax ignores; not in models that cap scores or have sinks beside
            them, which have no offset.
        fit_pairs: take N only as a start: N, and an angle by which each pair is turned, by gradient
            descent on the error of scores; no angles where heads are normed. Needs ``pre_rope`` without S.
        value_basis: each head's values as their "channels" are, rotated by a "hadamard" matrix, or
            "balanced": in the basis where rounding costs the block's output least (in place of
            Lambda1). Folded into v_proj and o_proj.
        search_columns: each balance of columns with the exponent, or without the balance, under which
            INT4 changes the layers' outputs least, in place of ``activation_exponent``.
        search_keys: for each kv head the number of outlier channels up to ``post_rope_channels``, the
            ratio of ``beta`` to ``alpha`` and the ``query_exponent`` under which INT4 keys change the
            block's output least, in place of the given ones.
    """

    residual_basis: ResidualBasis = "channels"
    qkv_input: bool = True
    value_output: bool = True
    gate_up_input: bool = True
    up_down: bool = True
    column_statistic: ColumnStatistic = "mean"
    pre_rope: bool = True
    alpha: float = 8.0
    post_rope_channels: int = 4
    beta: float = 8.0
    activation_exponent: float = 0.0
    pair_statistic: PairStatistic = "max"
    query_exponent: float = 0.0
    key_offset: bool = False
    fit_pairs: bool = False
    value_basis: ValueBasis = "channels"
    search_columns: bool = False
    search_keys: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_kinds(self)
        for name in ("activation_exponent", "query_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("alpha", "beta"):
            if not _KEY_SIZES[0] <= getattr(self, name) <= _KEY_SIZES[1]:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {_KEY_SIZES[0]} to {_KEY_SIZES[1]}")
        if self.post_rope_channels < 0:
            raise ValueError(f"post_rope_channels is {self.post_rope_channels}; expected 0 or more")
        if self.search_columns and self.activation_exponent:
            raise ValueError(f"activation_exponent is {self.activation_exponent}; expected 0 where it is searched")
        if self.search_keys and self.query_exponent:
            raise ValueError(f"query_exponent is {self.query_exponent}; expected 0 where it is searched")
        if self.search_keys and not (self.pre_rope or self.post_rope_channels):
            raise ValueError("search_keys has nothing to search; expected pre_rope or post_rope_channels")
        if self.fit_pairs and (self.post_rope_channels or not self.pre_rope):
            raise ValueError(
                f"fit_pairs needs pre_rope and no post_rope_channels, not {self.pre_rope} and {self.post_rope_channels}"
            )

    @property
    def measures_keys(self) -> bool:
        """Whether it needs statistics of the keys."""
        return self.pre_rope or self.post_rope_channels > 0 or self.key_offset or self.search_keys

    @property
    def measures_text(self) -> bool:
        """Whether it needs any statistics of calibration text."""
        of_inputs = self.activation_exponent > 0 or self.search_columns
        return self.measures_keys or of_inputs or self.value_basis == "balanced"


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How weights, activations, keys, values and queries are stored and computed with.

    Attributes:
        weight_format: "int4", or "fp4" or "nf4" (other magnitudes for the same codes), "fp8" (per
            channel) or "none" (as in the checkpoint).
        activation_format: "fp8" per token, or "none" (W4A16).
        group_size: inputs that share an INT4 scale, 64 or 128.
        scale_dtype: type of the group scales, "e4m3" or "bf16".
        channel_scale: float32 scale above the group scales: one for each output channel, or
            FireQ's one power of two for the tensor.
        rounding: INT4 codes by plain rounding or by the kernel's own table.
        scale_search: group and channel scales of INT4 weights by search for the least error on
            calibration text, instead of from the largest weight.
        error_compensation: INT4 codes that keep a layer's output on calibration text, instead of
            each weight (GPTQ, then coordinate descent).
        learned_steps: steps of gradient descent, block by block, on INT4 codes, channel scales and
            RMSNorm gains for the block's output on calibration text, from what the choices above
            made of them: slower, in place of error_compensation rather than on top of it. 0
            learns nothing.
        calibration_stream: what scale_search, error_compensation and learned_steps calibrate on:
            the float model's activations, or the quantized model's, whose distance to the float
            model's each layer then makes up for as well.
        kv_format: keys and values in the cache, "int4", "fp8" or "none".
        kv_group_size: channels that share a key or value scale; None means head_dim.
        key_clip, value_clip: INT4 scales of keys and values are clip * absmax / 7.
        unbiased_keys: INT4 keys with scales that keep each key's product with itself.
        query_format: "fp8" per token and head, or "none".
        lm_head_format: "fp8" (per channel, and FP8 inputs per token) or "none" (as in the
            checkpoint). A tied head becomes a second, FP8 copy of the embedding.
        smoothing: rescaling before rounding, or None.
        keep_float: patterns (``layer_patterns``) of linear layers left unquantized, such as
            "layers.0.*" or "*.mlp.down_proj".
        layer_formats: weight formats of some linear layers in place of ``weight_format``: pairs of a pattern and a
            format, or a mapping, such as {"layers.29.mlp.down_proj": "fp8"}. The last pattern that matches a layer
            decides; ``keep_float`` goes first. Layers of 8 bits are rounded to nearest, whatever the others measure.
        layer_kv_formats: likewise cache formats of some layers, by the names of their attention: {"layers.3.*":
            "fp8"} or {"layers.3.self_attn": "fp8"}. Queries are as :meth:`with_kv_format` has them.
        codebooks: the registered codebooks (:func:`~pallas_kernels.codebooks.register_codebook`) among weight formats:
            pairs of a name and magnitudes, or a mapping. They are registered when the config is made, and are found
            by themselves where they are registered already, so that the config is whole without that.
    """

    weight_format: WeightFormat = "int4"
    activation_format: ActivationFormat = "fp8"
    group_size: int = 128
    scale_dtype: formats.ScaleDtype = "e4m3"
    channel_scale: formats.ChannelScale = "per_channel"
    rounding: formats.Rounding = "nearest"
    scale_search: bool = False
    error_compensation: bool = False
    learned_steps: int = 0
    calibration_stream: CalibrationStream = "float"
    kv_format: formats.KVFormat = "int4"
    kv_group_size: int | None = None
    key_clip: float = 1.0
    value_clip: float = 1.0
    unbiased_keys: bool = False
    query_format: ActivationFormat = "fp8"
    lm_head_format: ActivationFormat = "none"
    smoothing: SmoothingConfig | None = None
    keep_float: tuple[str, ...] = ()
    layer_formats: Choices[WeightFormat] = ()
    layer_kv_formats: Choices[formats.KVFormat] = ()
    codebooks: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        given = registered(self.codebooks)
        if not isinstance(self.weight_format, str) or self.weight_format not in weight_formats():
            raise ValueError(f"weight_format is {self.weight_format!r}; expected one of {weight_formats()}")
        check_types(self)
        check_kinds(self)
        layer_formats = as_choices("layer_formats", self.layer_formats, weight_formats())
        used = {self.weight_format, *(chosen_format for _, chosen_format in layer_formats)}
        for name, value in (
            ("codebooks", tuple(sorted((given | own_codebooks(used)).items()))),
            ("keep_float", as_patterns("keep_float", self.keep_float)),
            ("layer_formats", layer_formats),
            ("layer_kv_formats", as_choices("layer_kv_formats", self.layer_kv_formats, get_args(formats.KVFormat))),
        ):
            object.__setattr__(self, name, value)
        if self.group_size not in (64, 128):
            raise ValueError(f"group_size is {self.group_size}; expected 64 or 128")
        if self.kv_group_size is not None and self.kv_group_size < 1:
            raise ValueError(f"kv_group_size is {self.kv_group_size}; expected a positive number or None")
        for name in ("key_clip", "value_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0 and at most 1")
        if not 0 <= self.learned_steps <= _MOST_STEPS:
            raise ValueError(f"learned_steps is {self.learned_steps}; expected 0 to {_MOST_STEPS}")
        if self.reads_text and self.weight_format not in formats.CODEBOOKS:
            raise ValueError(
                f"scale_search, error_compensation and learned_steps need one of weight_format "
                f"{tuple(formats.CODEBOOKS)}, not {self.weight_format!r}"
            )
        for name, weight_format in (("weight_format", self.weight_format), *self.layer_formats):
            if weight_format == "fp8" and self.activation_format != "fp8":
                of = "" if name == "weight_format" else f" of layer_formats {name!r}"
                raise ValueError(f"weight_format 'fp8'{of} needs activation_format 'fp8'")
        if self.weight_format == "none" and self.activation_format != "none":
            raise ValueError(f"activation_format {self.activation_format!r} needs quantized weights, not 'none'")

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is in another basis than the checkpoint's."""
        return self.smoothing is not None and self.smoothing.residual_basis != "channels"

    @property
    def measures_inputs(self) -> bool:
        """Whether rounding a weight needs the second moments of its inputs."""
        return self.scale_search or self.error_compensation

    @property
    def reads_text(self) -> bool:
        """Whether quantizing weights needs calibration text."""
        return self.measures_inputs or self.learned_steps > 0

    def weight_format_of(self, name: str) -> WeightFormat:
        """The format of the linear layer ``name``."""
        if any(matches(name, pattern) for pattern in self.keep_float):
            return "none"
        return chosen(name, self.layer_formats, self.weight_format)

    def keeps_float(self, name: str) -> bool:
        """Whether the linear layer ``name`` stays unquantized."""
        return self.weight_format_of(name) == "none"

    def for_linear(self, name: str) -> Self:
        """How the weight of the quantized linear layer ``name`` is made, without patterns."""
        weight_format = self.weight_format_of(name)
        plain = dataclasses.replace(self, keep_float=(), layer_formats=(), layer_kv_formats=())
        if weight_format in formats.CODEBOOKS:
            return dataclasses.replace(plain, weight_format=weight_format)
        return dataclasses.replace(
            plain, weight_format=weight_format, scale_search=False, error_compensation=False, learned_steps=0
        )

    def for_attention(self, name: str) -> Self:
        """How the attention ``name`` ("layers.3.self_attn") stores keys and values, without patterns for these."""
        kv_format: formats.KVFormat = chosen(name, self.layer_kv_formats, self.kv_format)
        if kv_format != self.kv_format:
            return self.with_kv_format(kv_format)
        return dataclasses.replace(self, layer_kv_formats=()) if self.layer_kv_formats else self

    def check_fits(self, linear_names: Iterable[str], head_dim: int) -> None:
        """Raise ValueError unless the config can be applied to a model with these linear layers and head_dim."""
        names = list(linear_names)
        check_patterns("keep_float", self.keep_float, names)
        kept = [name for name in names if any(matches(name, pattern) for pattern in self.keep_float)]
        check_choices("layer_formats", self.layer_formats, names, kept)
        attentions = [name.removesuffix(".qkv_proj") for name in names if name.endswith(".qkv_proj")]
        check_choices("layer_kv_formats", self.layer_kv_formats, attentions)
        if self.kv_group_size is not None and head_dim % self.kv_group_size:
            raise ValueError(f"kv_group_size is {self.kv_group_size}; expected a divisor of head_dim {head_dim}")
        if self.smoothing is not None and self.smoothing.post_rope_channels > head_dim:
            channels = self.smoothing.post_rope_channels
            raise ValueError(f"post_rope_channels is {channels}; expected at most head_dim {head_dim}")

    def with_kv_format(self, kv_format: formats.KVFormat) -> Self:
        """The same with one cache format in all layers; queries are FP8 exactly if keys and values are not float."""
        query_format = "none" if kv_format == "none" else "fp8"
        return dataclasses.replace(self, kv_format=kv_format, query_format=query_format, layer_kv_formats=())

    def with_float_weights(self) -> Self:
        """The same with weights and activations as they are."""
        return dataclasses.replace(
            self,
            weight_format="none",
            activation_format="none",
            scale_search=False,
            error_compensation=False,
            learned_steps=0,
            layer_formats=(),
        )

    def round_to_nearest(self) -> Self:
        """The same formats, as ``recipes.rtn`` rounds to them: nothing measured, smoothed, searched or learned."""
        return dataclasses.replace(
            self,
            channel_scale="per_channel",
            rounding="nearest",
            scale_search=False,
            error_compensation=False,
            learned_steps=0,
            calibration_stream="float",
            key_clip=1.0,
            value_clip=1.0,
            unbiased_keys=False,
            smoothing=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads them back. Fields that are new are there where they are used."""
        fields = dataclasses.asdict(self) | {"keep_float": list(self.keep_float)}
        later = {name: [list(pair) for pair in fields.pop(name)] for name in _LATER}
        return fields | {name: pairs for name, pairs in later.items() if pairs}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s output.

        Raises:
            ValueError: for unknown or missing keys and invalid values.
        """
        values = {**dict.fromkeys(_LATER, ()), **mapping(fields, "quantization")}
        check_names(cls, values)
        if values["smoothing"] is not None:
            smoothing = {"residual_basis": "channels", **mapping(values["smoothing"], "smoothing")}
            check_names(SmoothingConfig, smoothing)
            values["smoothing"] = SmoothingConfig(**smoothing)
        if not isinstance(values["keep_float"], list | tuple):
            raise ValueError(f"keep_float is {values['keep_float']!r}; expected a list of patterns")
        return cls(**values)


def registered(codebooks: Any) -> dict[str, tuple[float, ...]]:
    """The codebooks that a config holds, pairs or a mapping, which are registered."""
    given = pairs(codebooks, "codebooks", "a name and magnitudes")
    for name, magnitudes in given:
        if not isinstance(magnitudes, list | tuple):
            raise ValueError(f"codebook {quote(name)} is {quote(magnitudes)}; expected eight numbers")
        register_codebook(name, magnitudes)
    return own_codebooks(name for name, _ in given)
