"""Whether an array fits into memory, asked before it is made."""

import os
from collections.abc import Iterable
from typing import Any

import jax

from pallas_kernels.dispatch import default_device


def check_fits(what: str, needed: int, arrays: Iterable[Any] = ()) -> None:
    """Raise ValueError if ``needed`` bytes are more than there is room for.

    Room is what JAX's allocator on a GPU has left, and all of the machine's memory for a CPU: what passes may still
    be too much, with what else is there.

    Args:
        what: the array, for the message.
        needed: its bytes.
        arrays: what it is computed from, or their shapes, which are not there yet and are counted too; their devices
            hold it. None given means the default device.
    """
    arrays = list(arrays)
    planned = sum(x.size * x.dtype.itemsize for x in arrays if isinstance(x, jax.ShapeDtypeStruct))
    devices = {device for x in arrays if x.sharding is not None for device in x.sharding.device_set}
    room = _room(devices or {default_device()})
    if room is None:
        return
    if needed + planned > room:
        beside = f" beside the model's {planned:,}" if planned else ""
        raise ValueError(f"{what} takes {needed:,} bytes{beside}; {room:,} are available")


def _room(devices: Iterable[Any]) -> int | None:
    """Bytes that devices can hold more, together; None where nobody says."""
    if all(device.platform == "cpu" for device in devices):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None
    return sum(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats)
