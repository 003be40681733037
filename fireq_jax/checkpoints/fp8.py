"""Checkpoints in 8-bit floats: Hugging Face's "fp8" (DeepSeek's blocks), "fbgemm_fp8", and ModelOpt's formats."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.compressed_tensors import Nvfp4Storage
from fireq_jax.checkpoints.packing import unpack_nibbles
from fireq_jax.checkpoints.storage import (
    FLOAT_SCALES,
    Fp8Storage,
    Part,
    QuantizedFormat,
    ScaleGrid,
    Shape,
    Storage,
    block_sizes,
    group_size,
    matrix,
)
from fireq_jax.config_fields import quote
from fireq_jax.models.coded_weight import CodedKind, CodedWeight


def read_fp8(fields: Mapping[str, Any]) -> QuantizedFormat:
    """``quant_method`` "fp8": blocks that share a scale, or one scale a tensor.

    Transformers writes ``weight_block_size``, be it null, and calls scales ``weight_scale_inv``. AutoFP8 writes
    neither.

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    block, name = fields.get("weight_block_size"), ".weight_scale_inv"
    sizes = (None, None) if block is None else block_sizes(block, "weight_block_size")
    storage = Fp8Storage(ScaleGrid(*sizes), name if "weight_block_size" in fields else ".weight_scale")
    return QuantizedFormat("fp8", lambda layer: storage)


def read_fbgemm(fields: Mapping[str, Any]) -> QuantizedFormat:
    """``quant_method`` "fbgemm_fp8": a scale for each channel."""
    storage = Fp8Storage(ScaleGrid(1, None))
    return QuantizedFormat("fbgemm_fp8", lambda layer: storage)


def read_modelopt(fields: Mapping[str, Any]) -> QuantizedFormat:
    """``quantization`` of ``hf_quant_config.json``, or ``quant_method`` "modelopt".

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    size = group_size(fields.get("group_size") or 128, "group_size")
    storages: dict[str, Storage] = {
        "FP8": Fp8Storage(ScaleGrid(None, None)),
        "FP8_PER_CHANNEL_PER_TOKEN": Fp8Storage(ScaleGrid(1, None)),
        "W4A16_AWQ": ModelOptIntStorage(ScaleGrid(1, size), fp8_rows=False),
        "W4A8_AWQ": ModelOptIntStorage(ScaleGrid(1, size), fp8_rows=True),
        "NVFP4": Nvfp4Storage(".weight", ".weight_scale_2", divides=False),
    }
    algorithm = fields.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in storages:
        raise ValueError(f"quant_algo is {quote(algorithm)}; expected one of {', '.join(storages)}")
    if fields.get("has_zero_point"):
        raise ValueError("has_zero_point is true; expected symmetric codes")
    return QuantizedFormat(f"ModelOpt {algorithm}", lambda layer: storages[algorithm])


@dataclasses.dataclass(frozen=True)
class ModelOptIntStorage:
    """Signed integers of 4 bits, rows 2 i and 2 i + 1 in a byte; inputs may be multiplied by a vector before.

    That vector makes codes useless without it, and is in the floats. So there are no codes.

    Attributes:
        grid: of the scales.
        fp8_rows: whether activations are in FP8.
    """

    grid: ScaleGrid
    fp8_rows: bool

    @property
    def kind(self) -> CodedKind | None:
        """Floats: whether there is such a vector, the config does not say."""
        return None

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Codes, scales, the vector, and a scale of the weights' rounding to FP8, which is not used."""
        n, k = matrix(shape)
        return {
            ".weight": Part(((-(-n // 2), k),), ("U8",)),
            ".weight_scale": self.grid.part(n, k),
            ".weight_scale_2": Part(((), (1,)), FLOAT_SCALES, optional=True),
            ".pre_quant_scale": Part(((k,),), FLOAT_SCALES, optional=True),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """Multiplied by their scales and the vector."""
        n, k = matrix(shape)
        nibbles = unpack_nibbles(np.ascontiguousarray(parts[".weight"].T)).T[:n]
        weight = ((nibbles ^ 8) - 8) * self.grid.expand(parts[".weight_scale"], n, k)
        vector = parts.get(".pre_quant_scale")
        return weight if vector is None else weight * vector.astype(np.float32)
