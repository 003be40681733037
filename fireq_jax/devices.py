"""Devices by name, and where a model's arrays go."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax

from pallas_kernels.dispatch import default_device

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable
_PLATFORMS = "cpu", "gpu", "tpu"


def find_device(name: str) -> Device:
    """The device that is called so: "cpu", "gpu", or one of several, "gpu:1".

    Raises:
        ValueError: naming those that are there, if it is none of them.
    """
    platform, _, index = name.partition(":")
    devices = _of_platform(platform) if platform else []
    if not index and devices and not name.endswith(":"):
        return devices[0]
    if index.isdecimal() and int(index) < len(devices):
        return devices[int(index)]
    there = [f"{kind}:{i} ({each.device_kind})" for kind in _PLATFORMS for i, each in enumerate(_of_platform(kind))]
    raise ValueError(f"device is {name!r}; expected one of {', '.join(there)}")


def _of_platform(platform: str) -> list[Device]:
    try:
        return jax.devices(platform)
    except RuntimeError:  # JAX has no such platform here
        return []


@contextlib.contextmanager
def as_default(name: str | None) -> Iterator[None]:
    """Make a device JAX's default on all threads; None leaves it as it is.

    Raises:
        ValueError: if it is not there.
    """
    if name is None:
        yield
        return
    config: Any = jax.config
    before = config.jax_default_device
    config.update("jax_default_device", find_device(name))
    try:
        yield
    finally:
        config.update("jax_default_device", before)


def placement(device: Device | str | None, sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """Where to put arrays; None leaves it to JAX.

    Raises:
        ValueError: for a device that is not there, or both; or one of another kind than JAX's default device, which
            decides what ops are compiled to.
    """
    if device is not None and sharding is not None:
        raise ValueError(f"device is {device} and sharding {sharding}; expected one of them")
    if device is not None:
        sharding = jax.sharding.SingleDeviceSharding(find_device(device) if isinstance(device, str) else device)
    default = default_device()
    for each in () if sharding is None else sharding.device_set:
        if (each.platform, each.device_kind) != (default.platform, default.device_kind):
            raise ValueError(
                f"device is {each}, a {each.device_kind}, and JAX's default device {default}, a {default.device_kind}; "
                "expected one kind: choose the other first, with jax.config.update('jax_default_device', ...)"
            )
    return sharding
