"""Checkpoints of compressed-tensors (LLM Compressor and others): ``quant_method`` "compressed-tensors".

Its config has groups of layers, each with a format, a type of numbers, and how they share scales.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import MIDDLE, unpack_nibbles
from fireq_jax.checkpoints.storage import (
    E2M1,
    FLOAT_SCALES,
    MX_GROUP,
    Fp8Storage,
    Part,
    QuantizedFormat,
    ScaleGrid,
    Shape,
    Storage,
    block_sizes,
    coded,
    group_size,
    matrix,
    mx_weight,
)
from fireq_jax.config_fields import is_a, mapping, quote
from fireq_jax.models.coded_weight import CodedKind, CodedWeight

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized",
            "nvfp4-pack-quantized")  # fmt: skip
_EMBEDDINGS = ("embed_tokens", "wte")


def read_format(fields: Mapping[str, Any]) -> QuantizedFormat:
    """What ``quantization_config`` says.

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    for name, advice in (
        ("sparsity_config", "sparse weights are not supported; save the model dense"),
        ("transform_config", "rotations at run time are not supported; quantize the model without transforms"),
    ):
        given = fields.get(name) or {}
        dense = name == "sparsity_config" and isinstance(given, Mapping) and given.get("format") in (None, "dense")
        if given and not dense:
            raise ValueError(f"{name} is {quote(given)}: {advice}")
    if (status := fields.get("quantization_status")) not in (None, "compressed", "frozen"):
        raise ValueError(f"quantization_status is {quote(status)}; expected 'compressed': save the model compressed")
    groups = mapping(fields.get("config_groups"), "config_groups")
    storages: list[tuple[list[str], Storage]] = []
    for key, group in groups.items():
        name = f"config_groups.{key}"
        storages.append((_targets(mapping(group, name), name), _storage(group, fields.get("format"), name)))
    if not storages:
        raise ValueError("config_groups is empty; expected how weights are quantized")

    def storage_of(layer: str) -> Storage:
        by_rank = [(_rank(targets, layer), storage) for targets, storage in storages]
        return max(by_rank, key=lambda pair: pair[0])[1]

    return QuantizedFormat("compressed-tensors", storage_of)


def _targets(group: Mapping[str, Any], name: str) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{name}.targets is {quote(targets)}; expected a list of names")
    for target in targets:
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{name}.targets has {quote(target)}, which is no pattern: {error}") from error
    return targets


def _rank(targets: list[str], layer: str) -> int:
    """How closely a group's targets name a layer: by name, by pattern, by class, or not at all."""
    if layer in targets:
        return 3
    if any(re.match(target[3:], layer) for target in targets if target.startswith("re:")):
        return 2
    return int(("Embedding" if layer.endswith(_EMBEDDINGS) else "Linear") in targets)


def _storage(group: Mapping[str, Any], everywhere: Any, name: str) -> Storage:
    """How a group's layers are stored."""
    kind = everywhere if group.get("format") is None else group["format"]
    if kind not in _FORMATS:
        raise ValueError(f"{name}.format is {quote(kind)}; expected one of {', '.join(_FORMATS)}")
    weights = mapping(group.get("weights"), f"{name}.weights")
    if kind == "mxfp4-pack-quantized":
        return Mxfp4Storage()
    if kind == "nvfp4-pack-quantized":
        return Nvfp4Storage()
    grid = _grid(weights, f"{name}.weights")
    inputs = mapping(group.get("input_activations") or {}, f"{name}.input_activations")
    fp8_rows = inputs.get("type") == "float" and inputs.get("num_bits") == 8
    bits, numbers = weights.get("num_bits"), weights.get("type")
    if numbers == "float" and bits == 8:
        return Fp8Storage(grid)
    if numbers != "int" or bits not in (4, 8):
        raise ValueError(
            f"{name}.weights has num_bits {quote(bits)} and type {quote(numbers)}; expected 4 or 8 bits of type 'int', "
            "or 8 of type 'float'"
        )
    symmetric = weights.get("symmetric", True)
    if not is_a(symmetric, bool):
        raise ValueError(f"{name}.weights.symmetric is {quote(symmetric)}; expected true or false")
    # Early versions packed columns in the order of their activations, which they kept beside them.
    ordered = weights.get("actorder") in ("group", True)
    return IntStorage(bits, grid, symmetric, ordered, fp8_rows)


def _grid(weights: Mapping[str, Any], name: str) -> ScaleGrid:
    strategy, size, block = weights.get("strategy"), weights.get("group_size"), weights.get("block_structure")
    if strategy == "tensor":
        return ScaleGrid(None, None)
    if strategy == "channel":
        return ScaleGrid(1, None)
    if strategy == "group":
        return ScaleGrid(1, group_size(size, f"{name}.group_size"))
    if strategy == "block":
        return ScaleGrid(*block_sizes(block, f"{name}.block_structure"))
    raise ValueError(f"{name}.strategy is {quote(strategy)}; expected 'tensor', 'channel', 'group' or 'block'")


@dataclasses.dataclass(frozen=True)
class IntStorage:
    """Integers of 4 or 8 bits, packed into words along K or a byte each.

    Attributes:
        bits: of each.
        grid: of the scales.
        symmetric: whether they have no zero points.
        ordered: whether there is a group number for each column.
        fp8_rows: whether activations are in FP8.
    """

    bits: int
    grid: ScaleGrid
    symmetric: bool = True
    ordered: bool = False
    fp8_rows: bool = False

    @property
    def kind(self) -> CodedKind | None:
        """INT4, if the kernels have such groups."""
        if self.bits != 4 or self.ordered:
            return None
        return self.grid.int4_kind(fp8_rows=self.fp8_rows, exact=self.symmetric)

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Weights as ``weight_packed`` and ``weight_shape``, or as ``weight``; scales, zero points, group numbers."""
        n, k = matrix(shape)
        rows, columns = self.grid.shape(n, k)
        word = 32 // self.bits
        single: tuple[Shape, ...] = () if columns > 1 else ((rows,),) if rows > 1 else ((1,), ())
        parts = {
            ".weight_packed": Part(((n, -(-k // word)),), ("I32",), optional=True),
            ".weight": Part(((n, k),), ("I8",), optional=True),
            ".weight_shape": Part(((2,),), ("I64", "I32"), optional=True),
            ".weight_scale": self.grid.part(n, k),
            ".weight_zero_point": Part(
                ((rows, columns), (-(-rows // word), columns), *single),
                ("I32", "I8"),
                optional=self.symmetric,
            ),
        }
        return parts | ({".weight_g_idx": Part(((k,),), ("I32", "I64"))} if self.ordered else {})

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """Codes less zero points, or multiplied by their scales."""
        n, k = matrix(shape)
        stated = parts.get(".weight_shape")
        if stated is not None and tuple(stated.tolist()) != (n, k):
            raise ValueError(f"weight_shape is {tuple(stated.tolist())}; expected {(n, k)}")
        if (".weight" in parts) == (".weight_packed" in parts):
            raise ValueError("expected one of weight_packed and weight, the codes")
        codes = parts[".weight"] if ".weight" in parts else self._unpack(parts[".weight_packed"], k)
        groups = self.grid.shape(n, k)
        zeros = self._zeros(parts[".weight_zero_point"], groups) if ".weight_zero_point" in parts else None
        if self.symmetric and zeros is not None:  # early versions keep them
            if zeros.any():
                raise ValueError("weight_zero_point is not 0 everywhere, and the config says symmetric")
            zeros = None
        if self.ordered:
            group = parts[".weight_g_idx"].astype(np.int64)
            if group.min() < 0 or group.max() >= groups[1]:
                raise ValueError(f"weight_g_idx reaches from {group.min()} to {group.max()}, of {groups[1]} groups")
            shifted = codes.astype(np.int16) - (0 if zeros is None else zeros[:, group])
            return shifted * parts[".weight_scale"].astype(np.float32).reshape(groups)[:, group]
        if zeros is not None:
            wide = np.int8 if self.bits == 4 else np.int16
            codes = codes.astype(wide) - self.grid.expand(zeros, n, k).astype(wide)
        if self.kind is not None:
            return coded(codes, parts[".weight_scale"], self.grid, self.kind)
        return codes.astype(np.float32) * self.grid.expand(parts[".weight_scale"], n, k)

    def _unpack(self, packed: np.ndarray, count: int) -> np.ndarray:
        """int8 codes of words along the last axis, from offset binary."""
        if self.bits == 4:
            return unpack_nibbles(packed, MIDDLE)[:, :count]
        return (np.ascontiguousarray(packed).view(np.uint8)[:, :count] - np.uint8(128)).view(np.int8)

    def _zeros(self, zeros: np.ndarray, groups: tuple[int, int]) -> np.ndarray:
        """int8 [rows, groups]: as they are, or packed along the rows."""
        if zeros.size == groups[0] * groups[1]:
            return zeros.reshape(groups).astype(np.int8)
        return self._unpack(np.ascontiguousarray(zeros.T), groups[0]).T


@dataclasses.dataclass(frozen=True)
class Mxfp4Storage:
    """E2M1 in groups of 32 with scales 2^(e - 127)."""

    @property
    def kind(self) -> CodedKind | None:
        """FP8, in which such numbers are exact."""
        return CodedKind("fp8", None)

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Two weights a byte, the first in its low half."""
        n, k = matrix(shape)
        return {
            ".weight_packed": Part(((n, -(-k // 2)),), ("U8",)),
            ".weight_scale": Part(((n, -(-k // MX_GROUP)),), ("U8", "F8_E8M0")),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight:
        """As FP8."""
        codes = unpack_nibbles(parts[".weight_packed"])[:, : shape[1]]
        return mx_weight(codes, parts[".weight_scale"].view(np.uint8))


@dataclasses.dataclass(frozen=True)
class Nvfp4Storage:
    """E2M1 in groups of 16 with E4M3 scales, and a float32 scale above these.

    Attributes:
        weight: name of the weights, two a byte, the first in its low half.
        above: name of the scale above.
        divides: whether that divides.
    """

    weight: str = ".weight_packed"
    above: str = ".weight_global_scale"
    divides: bool = True
    kind: CodedKind | None = None

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Weights and two kinds of scales."""
        n, k = matrix(shape)
        return {
            self.weight: Part(((n, -(-k // 2)),), ("U8",)),
            ".weight_scale": Part(((n, -(-k // 16)),), ("F8_E4M3",)),
            self.above: Part(((1,), ()), FLOAT_SCALES),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """Multiplied by both scales."""
        n, k = matrix(shape)
        above = parts[self.above].astype(np.float32).reshape(())
        scale = parts[".weight_scale"].astype(np.float32)
        scale = scale / above if self.divides else scale * above
        return E2M1[unpack_nibbles(parts[self.weight])[:, :k]] * ScaleGrid(1, 16).expand(scale, n, k)
