"""Another basis for the residual stream, in which no channel of any layer's input stands out.

With an orthogonal Q every row of the stream becomes x Q: what writes to it is multiplied by Q, what reads from it by
Q^T. RMSNorm commutes with Q once its gain is folded into the layers after it, so the model computes what it did, and
nothing is left to do at run time (QuaRot, arXiv 2404.00456, and R1 of SpinQuant, arXiv 2405.16406). Rounding a weight
with its input's second moments gains most by it: they are no longer those of a few large channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.values import hadamard
from fireq_jax.models.block import Block, linears_of, mlp_name, norm_names
from fireq_jax.models.config import ModelConfig

SEED = 0  # the same model is converted to the same bits everywhere
_ROWS = 16384

_product = functools.partial(jnp.einsum, precision="highest")


def can_rotate(config: ModelConfig) -> bool:
    """Whether only RMSNorms read the residual stream: a norm behind a branch has gains that no layer after it takes."""
    return config.norm_kind == "rms" and config.norm_order in ("pre", "parallel")


def residual_rotation(width: int, seed: int = SEED) -> Float[np.ndarray, "D D"]:
    """A random orthogonal matrix whose entries are alike in size: signs times Hadamard.

    Where ``width`` is no power of two, its odd factor has a random orthogonal matrix instead: Kronecker's product of
    the two.
    """
    rng = np.random.default_rng(seed)
    power = math.gcd(width, 1 << width.bit_length())
    odd, _ = np.linalg.qr(rng.standard_normal((width // power, width // power)))
    signs = rng.choice([-1.0, 1.0], width)
    return (signs[:, None] * np.kron(odd, hadamard(power).astype(np.float64))).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def rotate_block(block: Block, config: ModelConfig, rotation: Float[Array, "D D"]) -> dict[str, Array]:
    """A block between rotated residual streams, with gains of 1 in its norms.

    Args:
        block: as ``models.block`` describes it, of a config that :func:`can_rotate`.
        config: the architecture.
        rotation: Q.

    Returns:
        The block's tensors in float32.
    """
    result = {name: array.astype(jnp.float32) for name, array in block.items()}
    norms = norm_names(config)
    for linear in linears_of(config):
        if linear.norm is None:  # it writes
            for name in linear.parts:
                result[f"{name}.weight"] = _product("...dk,de->...ek", result[f"{name}.weight"], rotation)
                if (bias := f"{name}.bias") in result:
                    result[bias] = _product("...d,de->...e", result[bias], rotation)
            continue
        gain = result[f"{linear.norm if linear.norm in norms else norms[0]}.weight"]
        readers = [f"{name}.weight" for name in linear.parts]
        if linear.parts[0].startswith(mlp_name(config)) and "mlp.router.weight" in result:
            readers.append("mlp.router.weight")
        for name in readers:
            result[name] = _product("...d,de->...e", result[name] * gain, rotation)
    return result | {f"{name}.weight": jnp.ones_like(result[f"{name}.weight"]) for name in norms}


def rotate_rows(
    rows: Float[np.ndarray, "V D"], rotation: Float[Array, "D D"], gain: Float[np.ndarray, " D"] | None = None
) -> Float[np.ndarray, "V D"]:
    """Embeddings, or a head after a norm whose ``gain`` it takes over, for the rotated stream; float32."""
    result = np.empty(rows.shape, np.float32)
    for begin in range(0, len(rows), _ROWS):  # a large vocabulary in float32 need not fit into device memory twice
        part = jnp.asarray(rows[begin : begin + _ROWS]).astype(jnp.float32)
        result[begin : begin + _ROWS] = _rotate(part if gain is None else part * gain, rotation)
    return result


@jax.jit
def _rotate(rows: Float[Array, "rows D"], rotation: Float[Array, "D D"]) -> Float[Array, "rows D"]:
    return _product("rd,de->re", rows, rotation)
