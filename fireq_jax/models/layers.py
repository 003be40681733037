"""Linear, norms and the gated MLP. Whether a Linear is quantized, its weight decides."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.models.config import GateActivation, ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats, layouts
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import Activation, deferred_matmul, epilogue
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.row_quantize import quantize_rows, rms_norm_quantize, sum_norm_quantize
from pallas_kernels.split_sum import SplitSum, finished

Tap = Callable[[str, Array], None]
_ACTIVATIONS: Mapping[GateActivation, Activation] = {
    "silu": "silu_mul", "gelu_tanh": "gelu_tanh_mul", "clamped_silu": "clamped_silu_mul"
}  # fmt: skip


def no_tap(name: str, x: Array) -> None:
    """The tap of a forward pass that nobody watches."""


def show(tap: Tap, name: str, rows: ScaledArray | Array) -> None:
    """Show a tap the numbers that a layer gets; nothing is computed for one that nobody reads."""
    if tap is not no_tap:
        tap(name, formats.dequantize(rows) if isinstance(rows, ScaledArray) else rows)


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What all layers of a model are made with.

    Attributes:
        quantization: which weights are quantized, and how.
        dtype: of float weights and hidden states.
        implementation: of the ops, see ``pallas_kernels.dispatch``.
        rngs: of random weights.
    """

    quantization: QuantizationConfig
    dtype: jax.typing.DTypeLike
    implementation: Implementation
    rngs: nnx.Rngs


def matmul_float(x: Float[Array, "*rows K"], weight: Float[Array, "N K"]) -> Float[Array, "*rows N"]:
    """x W^T in float32. float32 operands are multiplied as such, where a GPU's default would be TF32."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum("...k,nk->...n", x, weight, precision=precision, preferred_element_type=jnp.float32)


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
        options: LayerOptions,
        *,
        bias: bool,
    ) -> None:
        quantization, dtype, rngs = options.quantization, options.dtype, options.rngs
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
        self.implementation: Implementation = options.implementation

    @property
    def takes_fp8(self) -> bool:
        """Whether the weight multiplies FP8 rows."""
        return self.fp8_activations and isinstance(self.weight.get_value(), QuantizedTensor)

    @property
    def bare_weight(self) -> QuantizedTensor | None:
        """The weight, if multiplying FP8 rows by it and rounding to bfloat16 is all that the layer does."""
        weight = self.weight.get_value()
        bare = self.fp8_activations and self.bias is None and self.dtype == jnp.bfloat16
        return weight if bare and isinstance(weight, QuantizedTensor) else None

    def __call__(
        self,
        x: ScaledArray | Float[Array, "*rows K"],
        *,
        activation: Activation = "none",
        residual: Float[Array, "*rows N_out"] | None = None,
    ) -> Float[Array, "*rows N_out"]:
        """activation(x W^T + bias) + residual; sums in float32. FP8 rows only where it ``takes_fp8``."""
        return finished(self.deferred(x, activation=activation, residual=residual))

    def deferred(
        self,
        x: ScaledArray | Float[Array, "*rows K"],
        *,
        activation: Activation = "none",
        residual: Float[Array, "*rows N_out"] | None = None,
    ) -> Float[Array, "*rows N_out"] | SplitSum:
        """The same, maybe with the last sum left to the pass that reads it."""
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        if isinstance(weight, QuantizedTensor):
            if self.fp8_activations and not isinstance(x, ScaledArray):
                x = quantize_rows(x, implementation=self.implementation)
            return deferred_matmul(
                x,
                weight,
                bias=bias,
                activation=activation,
                residual=residual,
                out_dtype=self.dtype,
                implementation=self.implementation,
            )
        assert not isinstance(x, ScaledArray)
        return epilogue(matmul_float(x, weight), bias, activation, residual).astype(self.dtype)


class Norm(nnx.Module):
    """RMSNorm, x / rms(x) * weight over the last axis, or LayerNorm, the same of x less its mean; in float32.

    The weight is float32 whatever the model's dtype: smoothing folds factors into it.
    """

    def __init__(self, config: ModelConfig, implementation: Implementation) -> None:
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), jnp.float32))
        self.eps = config.rms_norm_eps
        self.kind = config.norm_kind
        self.implementation: Implementation = implementation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalized rows, in x's dtype."""
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normalized = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normalized * jnp.broadcast_to(self.weight.get_value(), x.shape)).astype(x.dtype)

    def quantized(self, x: Float[Array, "*rows D"]) -> ScaledArray:
        """Normalized rows in FP8, with no other rounding."""
        if self.kind == "layer":
            return quantize_rows(self(x.astype(jnp.float32)), implementation=self.implementation)
        return rms_norm_quantize(x, self.weight.get_value(), self.eps, implementation=self.implementation)

    def input_of(
        self, takes_fp8: bool, x: Float[Array, "*rows D"] | SplitSum, tap: Tap, name: str
    ) -> tuple[ScaledArray | Float[Array, "*rows D"], Float[Array, "*rows D"]]:
        """Normalized rows, in FP8 for what ``takes_fp8``, and x; ``tap`` sees the rows."""
        if takes_fp8 and self.kind == "rms" and isinstance(x, SplitSum):
            rows, x = sum_norm_quantize(x, self.weight.get_value(), self.eps, implementation=self.implementation)
        else:
            x = finished(x)
            rows = self.quantized(x) if takes_fp8 else self(x)
        show(tap, name, rows)
        return rows, x


class MLP(nnx.Module):
    """down_proj(act(gate) * up); gate and up are one matmul with interleaved rows."""

    def __init__(self, name: str, config: ModelConfig, options: LayerOptions) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        rows = layouts.interleaved_rows(inner)
        self.gate_up_proj = Linear(f"{name}.gate_up_proj", hidden, rows, options, bias=bias)
        self.down_proj = Linear(f"{name}.down_proj", inner, hidden, options, bias=bias)
        self.intermediate_size = inner
        self.activation: Activation = _ACTIVATIONS[config.activation]

    @property
    def takes_fp8(self) -> bool:
        """Whether it is given FP8 rows."""
        return self.gate_up_proj.takes_fp8

    def __call__(
        self,
        x: ScaledArray | Float[Array, "B T D"],
        residual: Float[Array, "B T D"] | None = None,
        tap: Tap = no_tap,
    ) -> Float[Array, "B T D"] | SplitSum:
        """MLP of ``x``, rows as gate_up_proj takes them, plus ``residual``."""
        hidden = self.gate_up_proj(x, activation=self.activation)[..., : self.intermediate_size]
        tap("down_input", hidden)
        return self.down_proj.deferred(hidden, residual=residual)
