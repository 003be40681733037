"""Weights that a checkpoint holds quantized: codes and scales, as read, fused and packed for the model.

A reader hands them out in place of floats where the model's kernels can multiply by them as they are. Whatever cannot
follow them takes :func:`float32_block`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fireq_jax.compilation import COMPILE_QUICKLY
from pallas_kernels import formats, layouts
from pallas_kernels.quantized_tensor import QuantizedTensor, over_stack

CodedFormat = Literal["int4", "fp8"]
_PIECE = 2**18  # codes
# The largest group scale of a channel in E4M3: 7 times it is E4M3's largest number.
_LARGEST_GROUP_SCALE = formats.E4M3_MAX / formats.INT4_MAX


class CodedKind(NamedTuple):
    """What a stored weight's codes are, as far as it is known before they are read.

    Attributes:
        format: of the codes.
        group_size: inputs that share a scale; None for one scale an output channel.
        fp8_rows: whether the checkpoint was made for FP8 activations.
        exact: whether the codes stand for all that is stored, but for -8, which becomes -7, and a rounding of group
            scales to bf16. Else a few are clipped.
    """

    format: CodedFormat
    group_size: int | None
    fp8_rows: bool = False
    exact: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CodedWeight:
    """W[n, k] = channel_scale[n] * group_scale[n, k // group_size] * values[n, k], or a stack of such.

    Attributes:
        values: int8 [*stack, N, K] ("int4"), or E4M3 [*stack, N, K] ("fp8"). Of integers beyond -7..7, as -8 or those
            of formats with zero points, the kernels get the nearest of these.
        group_scale: float32 [*stack, N, ceil(K / group_size)], > 0; None without groups.
        channel_scale: float32 [*stack, N], > 0.
        format: of the values.
        group_size: inputs that share a group scale, or None.
    """

    values: Any  # NumPy's from a reader, JAX's once they are fused
    group_scale: Any
    channel_scale: Any
    format: CodedFormat = dataclasses.field(metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[*stack, N, K]."""
        return self.values.shape

    @property
    def clipped(self) -> int:
        """How many codes the kernels do not have."""
        if self.format != "int4":
            return 0
        codes = np.asarray(self.values).reshape(-1).view(np.uint8)
        most = np.uint8(formats.INT4_MAX)
        # Modulo 256, the codes that there are, plus 7, are 0..14; a piece at a time, which stays in a core's cache.
        pieces = (codes[start : start + _PIECE] for start in range(0, codes.size, _PIECE))
        return sum(int(np.count_nonzero(piece + most > 2 * most)) for piece in pieces)

    def dequantize(self) -> np.ndarray:
        """float32 [*stack, N, K] on the host: what the codes stand for."""
        weight = np.asarray(self.values).astype(np.float32)
        if self.group_scale is not None:
            assert self.group_size is not None
            weight *= np.repeat(np.asarray(self.group_scale), self.group_size, axis=-1)[..., : weight.shape[-1]]
        weight *= np.asarray(self.channel_scale)[..., None]
        return weight

    @classmethod
    def unpack(cls, weight: QuantizedTensor) -> "CodedWeight":
        """What a weight of the kernels, or a stack of such, holds: the inverse of :meth:`pack`, on the host.

        With E4M3 group scales the kernels round each code times its group's scale to E4M3, which the codes do not say.

        Raises:
            ValueError: for a format that has other numbers than its codes.
        """
        if weight.format == "fp8":
            return cls(np.asarray(weight.values), None, np.asarray(weight.channel_scale), "fp8")
        if weight.format != "int4":
            raise ValueError(f"the weight's format is {weight.format!r}; expected 'int4' or 'fp8'")
        codes = jax.tree.map(np.asarray, _codes(weight))
        scale = codes.group_scale.astype(np.float32)
        return cls(codes.codes, scale, codes.channel_scale, "int4", weight.group_size)

    def pack(self, group_size: int, scale_dtype: formats.ScaleDtype) -> QuantizedTensor:
        """The same codes for the kernels.

        bf16 group scales are the stored ones, rounded. E4M3 ones are relative to a channel scale that lifts the largest
        to 64. Without groups all are 1, and nothing is rounded.

        Raises:
            ValueError: if groups of ``group_size`` do not divide the codes' own.
        """
        if self.format == "fp8":
            n, k = self.shape[-2:]
            return QuantizedTensor(jnp.asarray(self.values), None, jnp.asarray(self.channel_scale), (n, k), "fp8")
        if self.group_size is not None and self.group_size % group_size:
            raise ValueError(f"codes have groups of {self.group_size} inputs; expected a multiple of {group_size}")
        return _pack_int4(self, group_size, scale_dtype)

    def take_rows(self, index: np.ndarray) -> "CodedWeight":
        """Rows of N by number, -1 for rows of zeros with scales 1."""
        missing, index = index < 0, np.maximum(index, 0)

        def take(array: np.ndarray, axis: int, fill: int) -> np.ndarray:
            taken = np.take(array, index, axis=axis)
            if missing.any():
                taken[(..., missing) + (slice(None),) * (-axis - 1)] = fill
            return taken

        return dataclasses.replace(
            self,
            values=take(self.values, -2, 0),
            group_scale=None if self.group_scale is None else take(self.group_scale, -2, 1),
            channel_scale=take(self.channel_scale, -1, 1),
        )


BlockTensor = np.ndarray | Array | CodedWeight
HostTensor = np.ndarray | CodedWeight  # a checkpoint's


def float32_block(tensors: Mapping[str, BlockTensor]) -> dict[str, Array]:
    """A block in float32, with what its codes stand for."""
    return {name: jnp.asarray(as_float(tensor)).astype(jnp.float32) for name, tensor in tensors.items()}


def as_float(tensor: BlockTensor) -> np.ndarray | Array:
    """A tensor as it is, or float32 for codes."""
    return tensor.dequantize() if isinstance(tensor, CodedWeight) else tensor


def coded_alike(tensors: Sequence[BlockTensor]) -> bool:
    """Whether all are codes, of one format and in groups of one size."""
    kinds = {(tensor.format, tensor.group_size) if isinstance(tensor, CodedWeight) else None for tensor in tensors}
    return len(kinds) == 1 and None not in kinds


def joined(tensors: Sequence[BlockTensor], join: Callable[..., Array]) -> Any:
    """``join`` of arrays, or of the arrays of weights that are ``coded_alike``; of floats, where only some are coded.

    ``join`` may add rows of zeros, whose scales become 1.
    """
    if not coded_alike(tensors):
        return join(*(jnp.asarray(as_float(tensor)) for tensor in tensors))
    whole = jax.tree.map(lambda *arrays: join(*map(jnp.asarray, arrays)), *tensors)
    ones = jax.tree.map(lambda scale: jnp.where(scale == 0, 1, scale), (whole.group_scale, whole.channel_scale))
    return dataclasses.replace(whole, group_scale=ones[0], channel_scale=ones[1])


_codes = jax.jit(over_stack(QuantizedTensor.codes))


@functools.partial(jax.jit, static_argnums=(1, 2), compiler_options=COMPILE_QUICKLY)
def _pack_int4(weight: CodedWeight, group_size: int, scale_dtype: formats.ScaleDtype) -> QuantizedTensor:
    """Of a stack one by one."""
    n, k = weight.shape[-2:]
    padded, own_size = layouts.padded_shape(n, k)[1], weight.group_size

    def pack(values: Array, group_scale: Array | None, channel_scale: Array) -> QuantizedTensor:
        if group_scale is None or own_size is None:
            group_scale = jnp.ones((n, padded // group_size), jnp.float32)
        else:
            group_scale = jnp.repeat(group_scale, own_size // group_size, axis=1)[:, : padded // group_size]
            if scale_dtype == "e4m3":
                lift = formats.absmax_scale(jnp.max(group_scale, axis=1), _LARGEST_GROUP_SCALE)
                group_scale, channel_scale = group_scale / lift[:, None], channel_scale * lift
            missing = padded // group_size - group_scale.shape[1]
            group_scale = jnp.pad(group_scale, ((0, 0), (0, missing)), constant_values=1)
        rounded = formats.round_group_scale(group_scale, scale_dtype)
        codes = jnp.pad(formats.round_to_int4(values), ((0, 0), (0, padded - k)))
        packed = QuantizedTensor.from_codes(formats.WeightCodes(codes, rounded, channel_scale))
        return dataclasses.replace(packed, shape=(n, k))

    return over_stack(pack)(weight.values, weight.group_scale, weight.channel_scale)
