"""AWQ checkpoints of AutoAWQ: ``quant_method`` "awq", version "gemm"."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import AWQ_ORDER, Zeros, unpack_rows
from fireq_jax.checkpoints.storage import (
    FLOAT_SCALES,
    Part,
    QuantizedFormat,
    ScaleGrid,
    Shape,
    coded,
    group_size,
    matrix,
)
from fireq_jax.config_fields import quote
from fireq_jax.models.coded_weight import CodedKind, CodedWeight


def read_format(fields: Mapping[str, Any]) -> QuantizedFormat:
    """What ``quantization_config`` or ``quant_config.json`` says.

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    version = fields.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ValueError(f"version is {quote(version)}; expected 'gemm': save the model for that")
    bits = fields.get("bits", fields.get("w_bit"))
    if bits != 4:
        raise ValueError(f"bits is {quote(bits)}; expected 4")
    size = group_size(fields.get("group_size", fields.get("q_group_size", 128)), "group_size")
    if (zero_point := fields.get("zero_point", True)) is not True:
        raise ValueError(f"zero_point is {quote(zero_point)}; expected true")
    storage = AwqStorage(ScaleGrid(1, size))
    return QuantizedFormat("awq", lambda layer: storage)


@dataclasses.dataclass(frozen=True)
class AwqStorage:
    """Integers of 4 bits packed along N, [K, N], with zero points.

    Attributes:
        grid: of the scales, which groups of a row's inputs share.
    """

    grid: ScaleGrid

    @property
    def kind(self) -> CodedKind | None:
        """INT4, if the kernels have such groups; some codes are clipped."""
        return self.grid.int4_kind(exact=False)

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Codes, zero points and scales of the transposed weight."""
        n, k = matrix(shape)
        if n % 8:
            raise ValueError(f"the weight has shape {shape}; expected a multiple of 8 rows")
        groups = self.grid.shape(n, k)[1]
        return {
            ".qweight": Part(((k, n // 8),), ("I32",)),
            ".qzeros": Part(((groups, n // 8),), ("I32",)),
            ".scales": Part(((groups, n),), FLOAT_SCALES),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """Codes less zero points, or multiplied by their scales."""
        n, k = matrix(shape)
        zeros = unpack_rows(parts[".qzeros"], AWQ_ORDER).view(np.uint8)
        codes = unpack_rows(parts[".qweight"], AWQ_ORDER, Zeros(zeros, self.grid.columns))
        scale = parts[".scales"].T
        return codes * self.grid.expand(scale, n, k) if self.kind is None else coded(codes, scale, self.grid, self.kind)
