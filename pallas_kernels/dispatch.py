"""Which implementation of an op runs: a Hopper kernel or plain ``jax.numpy``.

"auto" picks the kernel on a Hopper GPU and falls back to "xla" otherwise, logging the reason
once for each op. A named implementation never falls back: it raises NotImplementedError.
"""

import functools
import logging
from typing import Literal, get_args

import jax

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
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; expected one of {get_args(Implementation)}")
    if implementation == "xla":
        return "xla"
    reason = unsupported or _not_hopper()
    if reason is None:
        return "mosaic_gpu"
    if implementation == "mosaic_gpu":
        raise NotImplementedError(f"{op}: the Hopper kernel cannot run: {reason}")
    _log_fallback(op, reason)
    return "xla"


@functools.cache
def _not_hopper() -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the default device is {device.platform!r}, not a GPU"
    capability = getattr(device, "compute_capability", "unknown")
    return None if capability == "9.0" else f"compute capability is {capability}, not 9.0 (Hopper)"


@functools.cache
def _log_fallback(op: str, reason: str) -> None:
    logger.info("%s: using plain XLA: %s", op, reason)
