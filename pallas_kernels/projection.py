"""A linear layer's operands, and its product whatever its weight is stored as."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import unreduced_matmul
from pallas_kernels.matmul_epilogue import Activation, epilogue
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.row_quantize import quantize_rows
from pallas_kernels.split_k import SplitKPartials


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "bias"), meta_fields=("fp8_rows",))
@dataclasses.dataclass(frozen=True)
class Projection:
    """y = x W^T + bias.

    Attributes:
        weight: [N, K], quantized or float.
        bias: [N], or None.
        fp8_rows: whether a quantized weight multiplies FP8 rows; else it multiplies rows as they are (W4A16).
    """

    weight: QuantizedTensor | Float[Array, "N K"]
    bias: Float[Array, " N"] | None = None
    fp8_rows: bool = True

    @property
    def takes_fp8(self) -> bool:
        """Whether it multiplies FP8 rows, and quantizes others."""
        return self.fp8_rows and isinstance(self.weight, QuantizedTensor)


def project(
    x: ScaledArray | Float[Array, "*rows K"],
    projection: Projection,
    *,
    activation: Activation = "none",
    residual: Float[Array, "*rows N_out"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows N_out"] | SplitKPartials:
    """activation(x W^T + bias) + residual, perhaps left as split-K partials to the kernel that reads it.

    Args:
        x: float rows, or FP8 rows where the projection ``takes_fp8``.
        projection: weight and bias.
        activation, residual, out_dtype: as in ``matmul.matmul``; sums are float32 throughout.
        implementation: of the matmul and the quantization, see ``dispatch``. Float weights are XLA's.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    weight = projection.weight
    if isinstance(weight, QuantizedTensor):
        if projection.fp8_rows and not isinstance(x, ScaledArray):
            x = quantize_rows(x, implementation=implementation)
        return unreduced_matmul(
            x,
            weight,
            bias=projection.bias,
            activation=activation,
            residual=residual,
            out_dtype=out_dtype,
            implementation=implementation,
        )
    if isinstance(x, ScaledArray):
        raise ValueError(f"x is FP8 rows and the weight {weight.dtype}; expected float rows for a float weight")
    return epilogue(matmul_float(x, weight), projection.bias, activation, residual).astype(out_dtype)


def matmul_float(x: Float[Array, "*rows K"], weight: Float[Array, "N K"]) -> Float[Array, "*rows N"]:
    """x W^T in float32. float32 operands are multiplied as such, where a GPU's default would be TF32."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum("...k,nk->...n", x, weight, precision=precision, preferred_element_type=jnp.float32)
