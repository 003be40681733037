"""What a conversion costs, said before it, and its report, written after it."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from checkpoints_convert.compensation import compensation_operations
from checkpoints_convert.held_out import Streams
from checkpoints_convert.work_folder import WorkFolder
from fireq_jax import json_files
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.block import block_shapes
from fireq_jax.quantization.config import QuantizationConfig


def cost_of(
    source: CheckpointReader,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None,
) -> str:
    """What a conversion will read, compute and store, in words."""
    config = source.config
    text = f"reads {source.nbytes / 1e9:.2f} GB twice (check, convert) in {config.num_layers} blocks"
    if tokens is None:
        return text + "; no calibration"
    parameters = sum(int(np.prod(shape)) for shape in block_shapes(config).values())
    operations = 2 * parameters * tokens.size
    states = 2 * tokens.size * config.hidden_size * 4
    unseen = 0 if held_out is None else held_out.size
    if quantization.reads_text:
        operations += compensation_operations(config, quantization, *tokens.shape)
        states *= 2 if quantization.calibration_stream == "quantized" else 1
    operations += 2 * parameters * unseen * len(Streams._fields)
    states += 2 * unseen * config.hidden_size * 4 * len(Streams._fields)
    return (
        f"{text}; calibration on {tokens.size} tokens, {unseen} held out: "
        f"{operations * config.num_layers / 1e12:.2f} TFLOP and {states / 1e9:.2f} GB of hidden states on disk"
    )


def report_of(
    model: Path,
    recipe: str,
    quantization: QuantizationConfig,
    source: CheckpointReader,
    fingerprint: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    work: WorkFolder,
    seconds: float,
) -> dict[str, Any]:
    """The report, but for what held-out text says.

    Args:
        model: the source's folder.
        recipe: its name.
        quantization: as it was applied.
        source: the checkpoint.
        fingerprint: of the conversion.
        records: of what is outside the blocks, then of each block.
        work: the conversion's folder.
        seconds: that all its runs took.
    """
    return {
        "model": str(model),
        "recipe": recipe,
        "quantization": quantization.to_dict(),
        "calibration_tokens": math.prod((fingerprint["calibration"] or [0])[:2]),
        "fitted_cache": json_files.read_json(work.fitted_cache) if work.fitted_cache.is_file() else None,
        "held_out": None,
        "bytes_before": source.nbytes,
        "bytes_after": sum(record["report"]["bytes"] for record in records),
        "seconds": round(seconds, 3),
        "peak_host_bytes": _peak_memory(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "layers": {f"layers.{index}": record["report"] for index, record in enumerate(records[1:])},
        "options": dict(fingerprint),
    }


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
