"""A quantized weight matrix as a pytree: what the matmul op multiplies by."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pallas_kernels import formats, layouts

WeightFormat = formats.Codebook | Literal["fp8"]
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """W [N, K] in 4 or 8 bits. N', K' are N, K rounded up to whole 64 x 128 tiles.

    Attributes:
        values: 4 bits: uint32 [N'/64, K'/128, 2, 128, 4], fragment order (see ``layouts``);
            "fp8": E4M3 [N, K].
        group_scale: 4 bits: E4M3 or bf16 [K'/group_size, N']; "fp8": None.
        channel_scale: float32 [N'] (4 bits) or [N] ("fp8").
        shape: (N, K), as the caller sees the matrix.
        format: "int4", or another of ``codebooks.CODEBOOKS``; or "fp8".

    Padded codes are 0 and padded scales 1, so that padding contributes exactly nothing.

    A stack of matrices of one shape, such as a layer's experts, has arrays with one more axis in front; ``jax.vmap``,
    ``jax.lax.scan`` and :func:`over_stack` take it apart.
    """

    values: Array
    group_scale: Array | None
    channel_scale: Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    format: WeightFormat = dataclasses.field(metadata={"static": True})

    @property
    def group_size(self) -> int:
        """Inputs that share one scale (K for "fp8")."""
        if self.group_scale is None:
            return self.shape[1]
        return layouts.padded_shape(*self.shape)[1] // self.group_scale.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return formats.nbytes(self)

    @classmethod
    def from_codes(cls, weight: formats.WeightCodes, codebook: formats.Codebook = "int4") -> Self:
        """Pack 4-bit codes and scales ([N, K], [N, G], [N]).

        Raises:
            ValueError: if the groups are not of 64 or 128 inputs each.
        """
        (n, k), groups = weight.codes.shape, weight.group_scale.shape[1]
        if k not in (64 * groups, 128 * groups):
            raise ValueError(f"codes have shape {(n, k)} and {groups} groups; expected groups of 64 or 128 inputs")
        pad_n, pad_k = (padded - size for padded, size in zip(layouts.padded_shape(n, k), (n, k), strict=True))
        group_size = k // groups
        group_scale = jnp.pad(
            weight.group_scale.T,
            ((0, pad_k // group_size), (0, pad_n)),
            constant_values=jnp.ones((), weight.group_scale.dtype),
        )
        channel_scale = jnp.pad(weight.channel_scale, (0, pad_n), constant_values=1)
        return cls(layouts.pack_weight(weight.codes), group_scale, channel_scale, (n, k), codebook)

    @classmethod
    def random(
        cls,
        key: Key[Array, ""],
        shape: tuple[int, int],
        *,
        format: WeightFormat = "int4",
        group_size: int = 128,
        scale_dtype: formats.ScaleDtype = "e4m3",
        std: float = 0.02,
    ) -> Self:
        """Random weights made in quantized form, about N(0, std^2), for tests and benchmarks.

        Codes are as common as those of Gaussian weights whose groups of 128 are scaled by their absmax: a matmul's
        energy, and under a power limit its speed, depends on them.
        """
        n, k = shape
        if format == "fp8":
            values = formats.to_e4m3(jax.random.normal(key, shape) * 100)
            return cls(values, None, jnp.full((n,), std / 100, jnp.float32), shape, format)
        padded_n, padded_k = layouts.padded_shape(n, k)
        code_key, scale_key = jax.random.split(key)
        # The largest of 128 Gaussian numbers is 2.7 standard deviations away, and has code 7.
        spread, mean_scale = 2.6, 20
        codes = layouts.pack_weight(formats.round_to_int4(jax.random.normal(code_key, shape) * spread))
        scale = jax.random.uniform(scale_key, (padded_k // group_size, padded_n), minval=8, maxval=32)
        channel = jnp.full((padded_n,), std / (spread * mean_scale), jnp.float32)
        if (padded_n, padded_k) != shape:
            group = jnp.arange(padded_k // group_size)[:, None] * group_size
            scale = jnp.where((group < k) & (jnp.arange(padded_n) < n), scale, 1.0)
            channel = jnp.where(jnp.arange(padded_n) < n, channel, 1.0)
        return cls(codes, formats.round_group_scale(scale, scale_dtype, format), channel, shape, format)

    def codes(self) -> formats.WeightCodes:
        """The unpacked 4-bit codes and scales, without padding."""
        if self.group_scale is None:
            raise ValueError(f"codes() needs a format of 4 bits; this tensor has {self.format!r}")
        n, k = self.shape
        group_scale = self.group_scale[: -(-k // self.group_size), :n].T
        return formats.WeightCodes(layouts.unpack_weight(self.values, n, k), group_scale, self.channel_scale[:n])

    def unscaled(self) -> Float[Array, "N K"]:
        """float32 values as the tensor cores see them: before ``channel_scale``."""
        if self.format == "fp8":
            return self.values.astype(jnp.float32)
        weight = self.codes()
        k = self.shape[1]
        codes = jnp.pad(weight.codes, ((0, 0), (0, -k % self.group_size)))
        return formats.decode_weight(codes, weight.group_scale, self.format)[:, :k]

    def dequantize(self) -> Float[Array, "*stack N K"]:
        """float32 matrix that the codes stand for, or each of a stack."""
        return over_stack(lambda matrix: matrix.unscaled() * matrix.channel_scale[: matrix.shape[0], None])(self)


def over_stack(function: Callable[..., T]) -> Callable[..., T]:
    """A function of matrices that takes stacks of them as well, one matrix after the other, and stacks its results.

    What its first argument is, a matrix or a stack, so are all. Neither the program nor the memory for intermediate
    values grows with the stack.
    """

    def of_each(*arguments: Any) -> T:
        first = arguments[0]
        rank = first.channel_scale.ndim + 1 if isinstance(first, QuantizedTensor) else first.ndim
        return function(*arguments) if rank == 2 else jax.lax.map(lambda each: function(*each), arguments)

    return of_each


def quantize(
    weight: Float[Array, "N K"],
    *,
    format: WeightFormat = "int4",
    group_size: int = 128,
    scale_dtype: formats.ScaleDtype = "e4m3",
    channel_scale: formats.ChannelScale = "per_channel",
    rounding: formats.Rounding = "nearest",
) -> QuantizedTensor:
    """Quantize and pack a weight; K is padded with zeros to whole tiles first.

    Raises:
        ValueError: for an unknown format or a group size that is neither 64 nor 128.
    """
    if format != "fp8" and format not in formats.CODEBOOKS:
        raise ValueError(f"weight format is {format!r}; expected one of {(*formats.CODEBOOKS, 'fp8')}")
    n, k = weight.shape
    if format == "fp8":
        rows = formats.quantize_fp8(weight)
        assert rows.scale is not None
        return QuantizedTensor(rows.values, None, rows.scale[:, 0], (n, k), format)
    if group_size not in (64, 128):
        raise ValueError(f"group_size is {group_size}; expected 64 or 128")
    padded = jnp.pad(weight, ((0, 0), (0, layouts.padded_shape(n, k)[1] - k)))
    codes = formats.quantize_weight(
        padded,
        group_size=group_size,
        scale_dtype=scale_dtype,
        channel_scale=channel_scale,
        rounding=rounding,
        codebook=format,
    )
    packed = QuantizedTensor.from_codes(codes, format)
    return dataclasses.replace(packed, shape=(n, k))
