"""Tests marked ``gpu`` skip themselves unless JAX's default device is an NVIDIA Hopper GPU.

Nothing here picks a platform: on a machine with a GPU, ``JAX_PLATFORMS=cpu pytest`` runs the
suite on the CPU.
"""

import jax
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU; the default device is {device.device_kind}"))
