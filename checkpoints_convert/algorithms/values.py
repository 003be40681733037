"""Another basis for each head's values: what makes them survive INT4 rows with one scale a token and head.

Folded into v_proj's rows and o_proj's columns, so that nothing is left to do at run time.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fireq_jax.models.config import ModelConfig

# Of a channel's energy: keeps directions that calibration text hardly used invertible.
RIDGE = 1e-4


def rotate_values(block: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """Hadamard-rotate each head's values: no channel stands out in the scale that its token shares.

    QuaRot, arXiv 2404.00456.
    """
    rotation = np.broadcast_to(hadamard(config.head_dim), (config.num_kv_heads, config.head_dim, config.head_dim))
    return change_value_basis(block, config, rotation, rotation.swapaxes(1, 2))


def balance_values(
    block: Mapping[str, Array], config: ModelConfig, second_moment: Float[Array, "kv_heads H H"]
) -> dict[str, Array]:
    """Bring each head's values into the basis in which INT4 costs the block's output least.

    A token's values v are rounded in steps of their largest magnitude, about alike in all channels,
    and o_proj reads that error. In the basis A v the cost is tr(A C A^T) tr(A^-T M A^-1), with
    C = E[v v^T] and M the Gram matrix of o_proj's columns. It is least for A^T A = P with P C P = M,
    where both matrices become one and the same (as a balanced realization has it); a rotation of A
    to their eigenvectors and a Hadamard matrix then make all channels equally large. Lambda1 is the
    special case of a diagonal A.

    Args:
        block: the weights.
        config: the architecture.
        second_moment: C, over the calibration tokens.
    """
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    # On the host: float64, and no compilation of small eigenvalue problems.
    output = np.asarray(block["self_attn.o_proj.weight"], np.float64)
    columns = output.reshape(-1, kv_heads, heads // kv_heads, head_dim)
    values = _regularized(np.asarray(second_moment, np.float64))
    readers = _regularized(np.einsum("dkgi,dkgj->kij", columns, columns))
    root = _power(values, 0.5)
    inverse_root = np.linalg.inv(root)
    metric = inverse_root @ _power(root @ readers @ root, 0.5) @ inverse_root
    balanced = _power(metric, 0.5)
    _, directions = np.linalg.eigh(balanced @ values @ balanced)
    basis = hadamard(head_dim) @ directions.swapaxes(1, 2) @ balanced
    return change_value_basis(block, config, basis.astype(np.float32), np.linalg.inv(basis).astype(np.float32))


@functools.partial(jax.jit, static_argnums=1)
def change_value_basis(
    block: Mapping[str, Array],
    config: ModelConfig,
    basis: Float[ArrayLike, "kv_heads H H"],
    inverse: Float[ArrayLike, "kv_heads H H"],
) -> dict[str, Array]:
    """v_proj's rows times A, o_proj's columns times its inverse: attention averages values linearly."""
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    product = functools.partial(jnp.einsum, precision="highest")
    output = block["self_attn.o_proj.weight"]
    columns = output.reshape(-1, kv_heads, heads // kv_heads, head_dim)
    result = {
        **block,
        "self_attn.o_proj.weight": product("dkgj,kji->dkgi", columns, inverse).reshape(output.shape),
    }
    for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
        if name in block:
            rows = block[name].reshape(kv_heads, head_dim, -1)
            result[name] = product("kij,kjd->kid", basis, rows).reshape(block[name].shape)
    return result


def _regularized(moment: Float[np.ndarray, "kv_heads H H"]) -> Float[np.ndarray, "kv_heads H H"]:
    """Positive definite: a ridge on each channel in proportion to itself, so that its unit does not matter."""
    diagonal = np.einsum("kii->ki", moment)
    ridge = RIDGE * np.where(diagonal > 0, diagonal, 1.0)
    return moment + ridge[..., None] * np.eye(moment.shape[-1])


def _power(matrix: Float[np.ndarray, "kv_heads H H"], exponent: float) -> Float[np.ndarray, "kv_heads H H"]:
    """A power of symmetric positive definite matrices."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, np.finfo(np.float64).tiny)[:, None] ** exponent) @ vectors.swapaxes(1, 2)


def hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """An orthogonal matrix of Sylvester-Hadamard blocks as large as the powers of two in ``size`` allow."""
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.kron([[1.0, 1.0], [1.0, -1.0]], block)
    return np.kron(np.eye(size // len(block)), block / math.sqrt(len(block))).astype(np.float32)
