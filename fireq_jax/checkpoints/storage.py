"""How quantized checkpoints store a linear layer, as far as their formats have it in common.

A format says which tensors stand for a weight [N, K], of what shapes and dtypes, and what they decode to: codes that
the kernels may multiply by, or float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from fireq_jax.config_fields import is_a, quote
from fireq_jax.models.coded_weight import CodedKind, CodedWeight
from pallas_kernels import formats

Shape = tuple[int, ...]
FLOAT_SCALES = ("F32", "BF16", "F16")
# What formats keep beside weights for others' kernels: scales of activations, and of keys and values.
UNUSED = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".input_scale_ub", ".activation_scale",
    ".activation_scale_ub", ".output_scale",
)  # fmt: skip
_LARGEST_GROUP = 2**16  # inputs of a group, or rows or columns of a block
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".k_zero_point", ".v_zero_point", ".prob_scale")


def group_size(value: Any, name: str) -> int | None:
    """How many inputs share a scale, None for all of them, as a config's -1 says.

    Raises:
        ValueError: for anything but that or a size.
    """
    if value == -1 and is_a(value, int):
        return None
    if not _is_size(value):
        raise ValueError(f"{name} is {quote(value)}; expected a whole number from 1 to {_LARGEST_GROUP}, or -1 for all")
    return value


def block_sizes(value: Any, name: str) -> tuple[int, int]:
    """Rows and columns of the blocks that share a scale.

    Raises:
        ValueError: for anything but a list of both.
    """
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_size, value)):
        raise ValueError(f"{name} is {quote(value)}; expected two whole numbers from 1 to {_LARGEST_GROUP}")
    return value[0], value[1]


def _is_size(value: Any) -> bool:
    return is_a(value, int) and 1 <= value <= _LARGEST_GROUP


class Part(NamedTuple):
    """One of the tensors that stand for a weight.

    Attributes:
        shapes: any of which it may have; none where any will do.
        dtypes: as safetensors spell them, likewise.
        optional: whether it may be missing.
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


class Storage(Protocol):
    """How one linear layer is stored."""

    @property
    def kind(self) -> CodedKind | None:
        """What ``decode`` gives; None for floats."""
        ...

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        """By what follows the layer's name, for a weight of a shape [N, K].

        Raises:
            ValueError: for a shape that the format does not have.
        """
        ...

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """The weight: codes if there is a ``kind``, else float32.

        Raises:
            ValueError: if the parts contradict each other or what the config says.
        """
        ...


@dataclasses.dataclass(frozen=True)
class QuantizedFormat:
    """What a checkpoint says of itself.

    Attributes:
        name: in messages.
        storage_of: the layer's name -> how it is stored, if it is quantized at all.
    """

    name: str
    storage_of: Callable[[str], Storage]


@dataclasses.dataclass(frozen=True)
class ScaleGrid:
    """Which weights share a scale: blocks of ``rows`` x ``columns``, None for all of them."""

    rows: int | None
    columns: int | None

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Of the scales of a weight [n, k]."""
        return -(-n // (self.rows or n)), -(-k // (self.columns or k))

    def part(self, n: int, k: int, dtypes: tuple[str, ...] = FLOAT_SCALES) -> Part:
        """The tensor that holds them; a single column or number may have fewer axes."""
        rows, columns = self.shape(n, k)
        shapes: list[Shape] = [(rows, columns)]
        if columns == 1 and self.columns is None:
            shapes.append((rows,))
        if rows == 1 and self.rows is None:
            shapes.append(())
        return Part(tuple(shapes), dtypes)

    def expand(self, scale: np.ndarray, n: int, k: int) -> np.ndarray:
        """Scales of each weight, or what broadcasts to them."""
        scale = scale.astype(np.float32).reshape(self.shape(n, k))
        if self.rows not in (None, 1):
            scale = np.repeat(scale, self.rows, axis=0)[:n]
        return scale if self.columns is None else np.repeat(scale, self.columns, axis=1)[:, :k]

    @property
    def by_row(self) -> bool:
        """Whether no scale is of some rows only, but for single ones."""
        return self.rows in (None, 1)

    def int4_kind(self, *, fp8_rows: bool = False, exact: bool = True) -> CodedKind | None:
        """What 4-bit integers with such scales are to the kernels, which have groups of 64 or 128 inputs."""
        if not self.by_row or (self.columns is not None and self.columns % 64):
            return None
        return CodedKind("int4", self.columns, fp8_rows, exact)


def coded(values: np.ndarray, scale: np.ndarray, grid: ScaleGrid, kind: CodedKind) -> CodedWeight:
    """Codes [N, K] and their scales, of a grid that is ``by_row``.

    Raises:
        ValueError: for a negative scale.
    """
    n, k = values.shape
    scale = np.broadcast_to(scale.astype(np.float32).reshape(grid.shape(n, k)), (n, grid.shape(n, k)[1]))
    if (scale < 0).any():
        where = np.unravel_index(int(np.argmax(scale < 0)), scale.shape)
        raise ValueError(f"a scale is {scale[where]} at {tuple(map(int, where))}; expected positive numbers")
    if not scale.all():  # of weights that are all 0
        values = np.where(np.repeat(scale == 0, grid.columns or k, axis=1)[:, :k], values.dtype.type(0), values)
        row = scale.max(axis=1, keepdims=True)  # in E4M3, a scale above all others would leave these no digits
        scale = np.where(scale == 0, np.where(row == 0, np.float32(1), row), scale)
    if grid.columns is None:
        return CodedWeight(values, None, np.ascontiguousarray(scale[:, 0]), kind.format)
    return CodedWeight(values, np.ascontiguousarray(scale), np.ones(n, np.float32), kind.format, grid.columns)


MX_GROUP = 32
# E2M1's sixteen numbers, by their bits.
E2M1 = np.array([*formats.CODEBOOKS["fp4"], *(-x for x in formats.CODEBOOKS["fp4"])], np.float32)


@dataclasses.dataclass(frozen=True)
class Fp8Storage:
    """8-bit floats with scales: per tensor, channel or block.

    Attributes:
        grid: of the scales.
        scale: their name.
        fp8_rows: whether activations are in FP8 as well.
    """

    grid: ScaleGrid
    scale: str = ".weight_scale"

    @property
    def kind(self) -> CodedKind | None:
        """FP8, unless in blocks."""
        return CodedKind("fp8", None, fp8_rows=True) if self.grid.by_row and self.grid.columns is None else None

    def parts(self, shape: Shape) -> dict[str, Part]:
        """The weight and its scales."""
        n, k = matrix(shape)
        scales = self.grid.part(n, k, (*FLOAT_SCALES, "F8_E8M0"))
        return {".weight": Part(((n, k),), ("F8_E4M3",)), self.scale: scales}

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight | np.ndarray:
        """As they are, or multiplied."""
        n, k = matrix(shape)
        values, scale = parts[".weight"], parts[self.scale]
        if self.kind is not None:
            return coded(values, scale, self.grid, self.kind)
        return values.astype(np.float32) * self.grid.expand(scale, n, k)


def mx_weight(codes: np.ndarray, exponents: np.ndarray) -> CodedWeight:
    """MXFP4 as FP8 with one scale a row, the largest of its groups' over 64: exact, down to 2^-14 of the largest.

    Args:
        codes: uint8 [*stack, N, K], E2M1's bits.
        exponents: uint8 [*stack, N, ceil(K / 32)], of E8M0 scales 2^(e - 127).
    """
    if (exponents == 255).any():
        raise ValueError("a scale is NaN; expected finite numbers")
    powers = exponents.astype(np.int32) - 127
    # 64 * 6 is in E4M3's range, and a channel scale has to be a normal float32.
    channel = np.maximum(powers.max(axis=-1) - 6, -126)
    relative = np.ldexp(np.float32(1), powers - channel[..., None])
    values = E2M1[codes] * np.repeat(relative, MX_GROUP, axis=-1)[..., : codes.shape[-1]]
    scale = np.ldexp(np.float32(1), channel)
    return CodedWeight(np.asarray(formats.to_e4m3(jnp.asarray(values))), None, scale, "fp8")


def matrix(shape: Shape) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"the weight has shape {shape}; expected a matrix")
    return shape[0], shape[1]
