"""What converting keeps of a checkpoint that was quantized before, and what the report says of it."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Array

from fireq_jax.checkpoints.kept_codes import keeping_codes, kept_tensors
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.block import linear_names
from fireq_jax.models.coded_weight import CodedWeight, float32_block
from fireq_jax.quantization.config import QuantizationConfig

# Of a block's codes. 1% was seen of weights with zero points; where 30% were clipped, quantizing anew lost less.
MANY_CLIPPED = 0.05
logger = logging.getLogger(__name__)


def fit_codes(
    source: CheckpointReader, quantization: QuantizationConfig, *, keep: bool
) -> tuple[QuantizationConfig, frozenset[str]]:
    """The recipe with the codes' group size, and the names of the linear layers that keep codes; none unless ``keep``.

    Only rounding scales to the recipe's, and codes outside -7..7, then change these layers.
    """
    if not source.quantized:
        return quantization, frozenset()
    names, kept = linear_names(source.config), frozenset[str]()
    if keep:
        quantization, kept = keeping_codes(source.coded, quantization)
    anew = sum(not quantization.keeps_float(name) for name in names) - len(kept)
    logger.info(
        "the checkpoint is quantized: %d of %d linear layers keep their codes, in groups of %d; %d are quantized anew "
        "from what their codes stand for, %d become floats",
        len(kept), len(names), quantization.group_size, anew, len(names) - len(kept) - anew,
    )  # fmt: skip
    return quantization, kept


def read_block(
    source: CheckpointReader, index: int, kept: Collection[str]
) -> tuple[dict[str, Array], dict[str, CodedWeight]]:
    """A block in float32, and the codes among its tensors that are kept."""
    stored = source.block(index)
    return float32_block(stored), kept_tensors(stored, index, source.config, kept)


def report_codes(
    errors: Mapping[str, float], index: int, kept: Collection[str], codes: Mapping[str, CodedWeight]
) -> dict[str, Any]:
    """Of a block: which of its quantized layers keep their codes, and how many of those were outside -7..7.

    The log says so too, with the ``errors``, by name in the layer, relative to what the stored codes stand for.
    """
    report = {
        "kept": [name for name in errors if f"layers.{index}.{name}" in kept],
        "quantized_anew": [name for name in errors if f"layers.{index}.{name}" not in kept],
        "clipped": sum(each.clipped for each in codes.values()),
    }
    each = ", ".join(
        f"{name} {'keeps its codes' if name in report['kept'] else 'anew'} (error {error:.2%})"
        for name, error in errors.items()
    )
    logger.info("layers.%d: %s; %d codes clipped", index, each or "floats", report["clipped"])
    stored = sum(weight.values.size for weight in codes.values())
    if report["clipped"] > MANY_CLIPPED * stored:
        logger.warning(
            "layers.%d: %.0f%% of the stored codes are outside -7..7 and clipped; --no-keep-codes quantizes them anew",
            index, 100 * report["clipped"] / stored,
        )  # fmt: skip
    return report
