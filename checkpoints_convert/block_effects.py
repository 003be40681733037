"""What smoothing and rounding did to a block, for the report and for plots."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.keys import KeyStatistics, KeyTransform
from fireq_jax.models.block import fuse_block
from fireq_jax.models.parameters import Parameter
from pallas_kernels import formats
from pallas_kernels.quantized_tensor import QuantizedTensor


def weight_errors(block: Mapping[str, Array], index: int, parameters: Mapping[str, Parameter]) -> dict[str, float]:
    """Relative Frobenius error of each quantized linear layer."""
    fused = fuse_block(block)
    return {
        name: round(float(_relative_error(parameters[full], fused[f"{name}.weight"])), 6)
        for name in sorted(linear.removesuffix(".weight") for linear in fused if linear.endswith("proj.weight"))
        if isinstance(parameters[full := f"layers.{index}.{name}.weight"], QuantizedTensor)
    }


def weight_sizes(index: int, parameters: Mapping[str, Parameter]) -> dict[str, dict[str, Any]]:
    """``format`` and ``bytes`` of each linear layer's weight as it is stored, by name in the layer."""
    return {
        full.removeprefix(f"layers.{index}.").removesuffix(".weight"): {
            "format": weight.format if isinstance(weight, QuantizedTensor) else str(weight.dtype),
            "bytes": formats.nbytes(weight),
        }
        for full, weight in sorted(parameters.items())
        if full.endswith("proj.weight")
    }


def smoothing_effect(
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    keys: KeyStatistics | None,
    transform: KeyTransform | None,
) -> dict[str, np.ndarray]:
    """Channel absmax before and after smoothing, for plots.

    Returns:
        ``<linear>.before`` and ``<linear>.after``, float32 [K]; with measured keys also
        ``keys.before``, ``keys.pre_rope`` (after N) and ``keys.post_rope`` (after N and S), [kv_heads, H],
        before pairs are turned.
    """
    effect = {}
    for moment, block in (("before", before), ("after", after)):
        for name, absmax in _column_absmax(dict(block)).items():
            effect[f"{name}.{moment}"] = np.asarray(absmax)
    if keys is not None and transform is not None:
        pre_rope = jnp.tile(transform.pairs.scale, (1, 2))
        effect["keys.before"] = np.asarray(keys.channel_max)
        effect["keys.pre_rope"] = np.asarray(keys.channel_max * pre_rope)
        effect["keys.post_rope"] = np.asarray(keys.channel_max * pre_rope * transform.post_rope_scale)
    return effect


@jax.jit
def _column_absmax(block: Mapping[str, Array]) -> dict[str, Float[Array, " K"]]:
    """Of each linear layer; of all experts together."""
    return {
        name.removesuffix(".weight"): formats.finite_absmax(weight.reshape(-1, weight.shape[-1]), axis=0)
        for name, weight in fuse_block(block).items()
        if name.endswith("proj.weight")
    }


@jax.jit
def _relative_error(quantized: QuantizedTensor, weight: Float[Array, "N K"]) -> Float[Array, ""]:
    norm = jnp.linalg.norm(weight)
    return jnp.linalg.norm(quantized.dequantize() - weight) / jnp.where(norm > 0, norm, 1.0)
