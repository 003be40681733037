"""The report of a conversion, written after it."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from checkpoints_convert.work_folder import WorkFolder
from fireq_jax import json_files
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.quantization.config import QuantizationConfig


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
