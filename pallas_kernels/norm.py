"""A norm over rows: RMSNorm (arXiv 1910.07467), or LayerNorm without a bias (arXiv 1607.06450), in float32."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.row_quantize import rms_norm_quantize

NormKind = Literal["rms", "layer"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("eps", "kind"))
@dataclasses.dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight; "layer" takes the mean from x before.

    Attributes:
        weight: what normalized rows are multiplied by, float32 [D].
        eps: added to the mean square, positive.
        kind: "rms", or "layer" (Cohere), which has no kernel of its own.
    """

    weight: Float[Array, " D"]
    eps: float
    kind: NormKind = "rms"

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalized rows, in x's dtype."""
        return self._normalized(x).astype(x.dtype)

    def quantized(self, x: Float[Array, "*rows D"], *, implementation: Implementation = "auto") -> ScaledArray:
        """Normalized rows in FP8, with no other rounding; for "rms" ``row_quantize.rms_norm_quantize``."""
        if self.kind == "layer":
            return formats.quantize_fp8(self._normalized(x))
        return rms_norm_quantize(x, self.weight, self.eps, implementation=implementation)

    def _normalized(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normalized = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normalized * jnp.broadcast_to(self.weight, x.shape)
