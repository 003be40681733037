"""Which implementation of an op runs: a Hopper kernel or plain ``jax.numpy``.

"auto" picks the kernel on a Hopper GPU and falls back to "xla" otherwise, logging the reason
once for each op. A named implementation never falls back: it raises NotImplementedError.
"""

import functools
import logging
from typing import Any, Literal, get_args

import jax

from pallas_kernels import jax_compat

Implementation = Literal["auto", "mosaic_gpu", "xla"]
logger = logging.getLogger(__name__)


def resolve(op: str, implementation: Implementation, unsupported: str | None) -> Literal["mosaic_gpu", "xla"]:
    """The implementation to run.

    Args:
        op: the op's name, for messages.
        implementation: what the caller asked for.
        unsupported: why the kernel cannot run these arguments, or None if it can.

    Raises:
        ValueError: for an unknown implementation.
        NotImplementedError: if "mosaic_gpu" was asked for and cannot run.
    """
    check_implementation(implementation)
    if implementation == "xla":
        return "xla"
    # The device first: without a Hopper GPU no other operands would help.
    reasons = [reason for reason in (_not_hopper(), unsupported) if reason is not None]
    if not reasons:
        if jax_compat.SLOW_KERNELS is not None:
            _warn_once(jax_compat.SLOW_KERNELS)
        return "mosaic_gpu"
    if implementation == "mosaic_gpu":
        raise NotImplementedError(f"{op}: the Hopper kernel cannot run: {'; and '.join(reasons)}")
    _log_fallback(op, reasons[0])
    return "xla"


def check_implementation(implementation: Implementation) -> None:
    """Raise ValueError for an unknown one."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; expected one of {get_args(Implementation)}")


def default_device() -> Any:
    """Where JAX computes what is placed nowhere: ``jax.default_device``'s, else the first."""
    config: Any = jax.config
    chosen = config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def compute_capability() -> tuple[int, ...]:
    """Of the default device, such as (9, 0); () if it is no NVIDIA GPU."""
    numbers = str(getattr(default_device(), "compute_capability", "")).split(".")
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else ()


def _not_hopper() -> str | None:
    if compute_capability() == (9, 0):
        return None
    device = default_device()
    if device.platform != "gpu":
        return f"the default device is {device.platform!r}, not a GPU"
    name, capability = (getattr(device, field, "unknown") for field in ("device_kind", "compute_capability"))
    return f"the default device is {name!r} of compute capability {capability}, not 9.0 (Hopper)"


@functools.cache
def _log_fallback(op: str, reason: str) -> None:
    logger.info("%s: using plain XLA: %s", op, reason)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
