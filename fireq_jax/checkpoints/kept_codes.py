"""Which linear layers of a quantized checkpoint keep their codes: when it is run as it is, and when it is converted."""

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping

from fireq_jax.models.block import block_shapes, linear_names, linears_of
from fireq_jax.models.coded_weight import BlockTensor, CodedFormat, CodedKind, CodedWeight
from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig

_GROUPS = (128, 64)  # that the kernels have


def quantization_as_stored(config: ModelConfig, coded: Mapping[str, CodedKind]) -> QuantizationConfig:
    """The config with which a checkpoint runs as it is: codes where they are exact, floats elsewhere.

    INT4 groups have bf16 scales, which are the stored ones but for a rounding; without groups E4M3's scales of 1 are
    faster and as exact. Activations are FP8 if the checkpoint was made for that, or its weights are FP8. Of several
    formats all are kept where activations are FP8, and else the one of most weights.

    Args:
        config: the architecture.
        coded: what the reader says it has codes of.
    """
    exact = {name: kind for name, kind in coded.items() if kind.exact}
    if not exact:
        return recipes.none()
    shapes = block_shapes(config)
    sizes = {
        linear.name: sum(math.prod(shapes[f"{part}.weight"]) for part in linear.parts) for linear in linears_of(config)
    }
    weights = collections.Counter[CodedFormat]()
    for name, kind in exact.items():
        weights[kind.format] += sizes[name.split(".", 2)[2]]
    chosen = weights.most_common(1)[0][0]
    fp8_rows = all(kind.fp8_rows or kind.format == "fp8" for kind in exact.values())
    kept = {name: kind for name, kind in exact.items() if fp8_rows or kind.format == chosen}
    quantization = recipes.w8a8_fp8() if chosen == "fp8" else recipes.w4a16()
    if chosen == "int4" and fp8_rows:
        quantization = dataclasses.replace(quantization, activation_format="fp8")
    int4 = {name: kind for name, kind in kept.items() if kind.format == "int4"}
    if int4:
        grouped = any(kind.group_size is not None for kind in int4.values())
        scale_dtype = "bf16" if grouped else "e4m3"
        quantization = dataclasses.replace(quantization, group_size=_common_group(int4), scale_dtype=scale_dtype)
    return dataclasses.replace(
        quantization,
        keep_float=tuple(name for name in linear_names(config) if name not in kept),
        layer_formats=tuple((name, kind.format) for name, kind in kept.items() if kind.format != chosen),
    )


def keeping_codes(
    coded: Mapping[str, CodedKind], quantization: QuantizationConfig
) -> tuple[QuantizationConfig, frozenset[str]]:
    """The linear layers whose codes fit a recipe, and the recipe with groups of the size that they have."""
    kept = {name: kind for name, kind in coded.items() if kind.format == quantization.weight_format_of(name)}
    if int4 := {name: kind for name, kind in kept.items() if kind.format == "int4"}:
        size = min(quantization.group_size, _common_group(int4))
        quantization = dataclasses.replace(quantization, group_size=size)
    return quantization, frozenset(kept)


def kept_tensors(
    block: Mapping[str, BlockTensor], index: int, config: ModelConfig, kept: Collection[str]
) -> dict[str, CodedWeight]:
    """Of a block's tensors the codes of the linear layers ``kept``, which go by their full names."""
    parts = {
        f"{part}.weight"
        for linear in linears_of(config)
        if f"layers.{index}.{linear.name}" in kept
        for part in linear.parts
    }
    return {name: tensor for name, tensor in block.items() if name in parts and isinstance(tensor, CodedWeight)}


def _common_group(kinds: Mapping[str, CodedKind]) -> int:
    """The largest of the kernels' groups that all codes' own are multiples of."""
    sizes = [kind.group_size for kind in kinds.values() if kind.group_size is not None]
    return next(group for group in _GROUPS if all(size % group == 0 for size in sizes))
