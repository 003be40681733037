"""GPTQ checkpoints (AutoGPTQ, GPTQModel): ``quant_method`` "gptq", or of old only a ``quantize_config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import MIDDLE, Zeros, unpack_columns, unpack_rows
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
from fireq_jax.config_fields import is_a, quote
from fireq_jax.models.coded_weight import CodedKind, CodedWeight

_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


def read_format(fields: Mapping[str, Any]) -> QuantizedFormat:
    """What ``quantization_config`` or ``quantize_config.json`` says.

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    version = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if not isinstance(version, str) or version not in _VERSIONS:
        raise ValueError(
            f"checkpoint_format is {quote(version)}; expected one of {', '.join(_VERSIONS)}: save the model in one"
        )
    if (bits := fields.get("bits")) not in (4, 8):
        raise ValueError(f"bits is {quote(bits)}; expected 4 or 8")
    size = group_size(fields.get("group_size", -1), "group_size")
    flags = {name: fields.get(name, default) for name, default in (("sym", True), ("desc_act", False))}
    for name, value in flags.items():
        if not is_a(value, bool):
            raise ValueError(f"{name} is {quote(value)}; expected true or false")
    if fields.get("dynamic"):
        raise ValueError(f"dynamic is {quote(fields['dynamic'])}; expected one format for all layers")
    ordered = flags["desc_act"] and size is not None
    storage = GptqStorage(bits, ScaleGrid(1, size), flags["sym"], ordered, _VERSIONS[version])
    return QuantizedFormat("gptq", lambda layer: storage)


@dataclasses.dataclass(frozen=True)
class GptqStorage:
    """Integers packed along K, [K, N], with zero points and group numbers.

    Attributes:
        bits: of each.
        grid: of the scales, which groups of a row's inputs share.
        symmetric: whether zero points are all in the middle.
        ordered: whether groups are of columns that are not neighbours.
        offset: what is added to a stored zero point.
    """

    bits: int
    grid: ScaleGrid
    symmetric: bool
    ordered: bool
    offset: int

    @property
    def kind(self) -> CodedKind | None:
        """INT4, if the kernels have such groups, and columns are in order."""
        if self.bits != 4 or self.ordered:
            return None
        return self.grid.int4_kind(exact=self.symmetric)

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Codes, zero points and scales of the transposed weight."""
        n, k = matrix(shape)
        word, groups = 32 // self.bits, self.grid.shape(n, k)[1]
        if k % word or n % word:
            raise ValueError(f"the weight has shape {shape}; expected multiples of {word}")
        return {
            ".qweight": Part(((k // word, n),), ("I32",)),
            ".qzeros": Part(((groups, n // word),), ("I32",)),
            ".scales": Part(((groups, n),), FLOAT_SCALES),
            ".g_idx": Part(((k,),), ("I32", "I64"), optional=not self.ordered),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """Codes less zero points, or multiplied by their scales."""
        n, k = matrix(shape)
        groups, natural = self.grid.shape(n, k)[1], np.arange(k) // (self.grid.columns or k)
        group = parts[".g_idx"].astype(np.int64) if ".g_idx" in parts else natural
        if group.min() < 0 or group.max() >= groups:
            raise ValueError(f"g_idx reaches from {group.min()} to {group.max()}; there are {groups} groups")
        if not self.ordered and not np.array_equal(group, natural):
            raise ValueError(
                f"g_idx is not in order, and the config says desc_act false, group_size {self.grid.columns}"
            )
        four = self.bits == 4
        zeros = unpack_rows(parts[".qzeros"]) if four else np.ascontiguousarray(parts[".qzeros"]).view(np.uint8).T
        zeros = zeros.astype(np.int16) + self.offset
        self._check_zeros(zeros)
        weight, scale = parts[".qweight"], parts[".scales"].T
        if self.kind is not None:
            less = MIDDLE if self.symmetric else Zeros(zeros.astype(np.uint8), self.grid.columns)
            return coded(unpack_columns(weight, less), scale, self.grid, self.kind)
        codes = unpack_columns(weight) if four else np.ascontiguousarray(weight.T).view(np.uint8)
        return (codes.astype(np.float32) - zeros[:, group]) * scale.astype(np.float32)[:, group]

    def _check_zeros(self, zeros: np.ndarray) -> None:
        middle = 2 ** (self.bits - 1)
        if self.symmetric and (zeros != middle).any():
            found = zeros[zeros != middle][0]
            raise ValueError(
                f"qzeros stand for a zero point of {found}; expected {middle} of symmetric codes: is checkpoint_format "
                f"right (the zero points of 'gptq' are stored less 1, those of 'gptq_v2' as they are), or sym?"
            )
