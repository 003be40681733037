"""Linear, RMSNorm and the gated MLP. Whether a Linear is quantized, its weight decides."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import layouts
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.norm import Norm
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.split_sum import finished

Tap = Callable[[str, Array], None]


def no_tap(name: str, x: Array) -> None:
    """The tap of a forward pass that nobody watches."""


class Linear(nnx.Module):
    """y = x W^T + bias, W [N, K] a plain array or a :class:`QuantizedTensor`.

    Attributes:
        weight: [N, K] in ``dtype``, or quantized.
        bias: [N] in ``dtype``, or None.
        dtype: of the result.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quantization: QuantizationConfig,
        dtype: jax.typing.DTypeLike,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (out_features, in_features)
        weight: Array | QuantizedTensor
        if quantization.weight_format == "none" or quantization.keeps_float(name):
            weight = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype)
        else:
            weight = QuantizedTensor.random(
                rngs.params(),
                shape,
                format=quantization.weight_format,
                group_size=quantization.group_size,
                scale_dtype=quantization.scale_dtype,
            )
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.dtype = jnp.dtype(dtype)
        self.fp8_activations = quantization.activation_format == "fp8"
        self.implementation: Implementation = implementation

    @property
    def projection(self) -> Projection:
        """Weight and bias, for ops that multiply by them among other things."""
        bias = None if self.bias is None else self.bias.get_value()
        return Projection(self.weight.get_value(), bias, self.fp8_activations)

    @property
    def takes_fp8(self) -> bool:
        """Whether the weight multiplies FP8 rows."""
        return self.projection.takes_fp8

    def __call__(
        self,
        x: ScaledArray | Float[Array, "*rows K"],
        *,
        activation: Activation = "none",
        residual: Float[Array, "*rows N_out"] | None = None,
    ) -> Float[Array, "*rows N_out"]:
        """activation(x W^T + bias) + residual; sums in float32. FP8 rows only where it ``takes_fp8``."""
        return finished(
            project(
                x,
                self.projection,
                activation=activation,
                residual=residual,
                out_dtype=self.dtype,
                implementation=self.implementation,
            )
        )


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32.

    The weight is float32 whatever the model's dtype: smoothing folds factors into it.
    """

    def __init__(self, width: int, eps: float, implementation: Implementation) -> None:
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps
        self.implementation: Implementation = implementation

    @property
    def norm(self) -> Norm:
        """Weight and eps, for ops that normalize among other things."""
        return Norm(self.weight.get_value(), self.eps)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalized rows, in x's dtype."""
        return self.norm(x)

    def quantized(self, x: Float[Array, "*rows D"]) -> ScaledArray:
        """Normalized rows in FP8, with no other rounding."""
        return self.norm.quantized(x, implementation=self.implementation)


class MLP(nnx.Module):
    """The weights of down_proj(SiLU(gate) * up); gate and up are one matmul with interleaved rows."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        quantization: QuantizationConfig,
        dtype: jax.typing.DTypeLike,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(
            Linear, bias=bias, quantization=quantization, dtype=dtype, implementation=implementation, rngs=rngs
        )
        self.gate_up_proj = linear(f"{name}.gate_up_proj", hidden_size, layouts.interleaved_rows(intermediate_size))
        self.down_proj = linear(f"{name}.down_proj", intermediate_size, hidden_size)
