"""Differences between the supported JAX versions (0.10.2 to 0.12), in one place."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3])

# From 0.12 on nvJitLink assembles kernels, and it ignores setmaxnreg (findings/nvjitlink_ignores_setmaxnreg.sh): warps
# that compute have 168 registers instead of 240, and spill.
SLOW_KERNELS: str | None = (
    f"JAX {jax.__version__} assembles kernels in a way that makes those for many tokens take 1.2 to 2.2 times as long; "
    "pip install 'jax[cuda13]<0.12' for full speed"
    if JAX_VERSION >= (0, 12)
    else None
)


def transpose_ref(ref: Any, permutation: tuple[int, ...] = (1, 0)) -> Any:
    """A view of a ref with its dimensions permuted; a matrix's are exchanged."""
    if JAX_VERSION < (0, 11):
        return plgpu.transpose_ref(ref, permutation)
    return ref.transpose(permutation)


def load_registers(ref: Any, layout: Any) -> jax.Array:
    """The whole ``ref`` in registers, in a layout for which the loads need not be wide."""
    if JAX_VERSION < (0, 11, 2):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def store_registers(ref: Any, value: jax.Array) -> None:
    """Store to the whole ``ref`` from a layout for which the stores need not be wide."""
    if JAX_VERSION < (0, 12):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
