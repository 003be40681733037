"""Linear, norms and the gated MLP. Whether a Linear is quantized, its weight decides."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.models.config import GateActivation, ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats, layouts, norm
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.split_k import reduced

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
        if (weight_format := quantization.weight_format_of(name)) == "none":
            weight = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype)
        else:
            weight = QuantizedTensor.random(
                rngs.params(),
                shape,
                format=weight_format,
                group_size=quantization.group_size,
                scale_dtype=quantization.scale_dtype,
            )
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.dtype = jnp.dtype(dtype)
        self.fp8_activations = quantization.activation_format == "fp8"
        self.implementation: Implementation = options.implementation

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
        return reduced(
            project(
                x,
                self.projection,
                activation=activation,
                residual=residual,
                out_dtype=self.dtype,
                implementation=self.implementation,
            )
        )


class Norm(nnx.Module):
    """RMSNorm, x / rms(x) * weight over the last axis, or LayerNorm, the same of x less its mean; in float32.

    The weight is float32 whatever the model's dtype: smoothing folds factors into it.
    """

    def __init__(self, config: ModelConfig, implementation: Implementation) -> None:
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), jnp.float32))
        self.eps = config.rms_norm_eps
        self.kind: norm.NormKind = config.norm_kind
        self.implementation: Implementation = implementation

    @property
    def operand(self) -> norm.Norm:
        """Weight and options, for ops that normalize among other things."""
        return norm.Norm(self.weight.get_value(), self.eps, self.kind)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalized rows, in x's dtype."""
        return self.operand(x)

    def quantized(self, x: Float[Array, "*rows D"]) -> ScaledArray:
        """Normalized rows in FP8, with no other rounding."""
        return self.operand.quantized(x, implementation=self.implementation)


class MLP(nnx.Module):
    """down_proj(act(gate) * up); gate and up are one matmul with interleaved rows."""

    def __init__(self, name: str, config: ModelConfig, options: LayerOptions) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        rows = layouts.interleaved_rows(inner)
        self.gate_up_proj = Linear(f"{name}.gate_up_proj", hidden, rows, options, bias=bias)
        self.down_proj = Linear(f"{name}.down_proj", inner, hidden, options, bias=bias)
        self.intermediate_size = inner
        self.activation: Activation = _ACTIVATIONS[config.activation]

    def __call__(
        self,
        x: ScaledArray | Float[Array, "B T D"],
        residual: Float[Array, "B T D"] | None = None,
        tap: Tap = no_tap,
    ) -> Float[Array, "B T D"]:
        """MLP of ``x``, rows as gate_up_proj takes them, plus ``residual``."""
        hidden = self.gate_up_proj(x, activation=self.activation)[..., : self.intermediate_size]
        tap("down_input", hidden)
        return self.down_proj(hidden, residual=residual)
