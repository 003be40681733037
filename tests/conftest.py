"""Tests marked ``gpu`` skip themselves unless JAX's default device is an NVIDIA Hopper GPU.

Nothing here picks a platform: on a machine with a GPU, ``JAX_PLATFORMS=cpu pytest`` runs the
suite on the CPU.

On a CPU LLVM does not optimize, for tests compile more than they compute and take two thirds of
the time so; XLA's own passes are as always. ``JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest`` has both.

Pallas' GPU interpreter blocks one of XLA's threads for each warpgroup that waits, and hangs when none
is left. On a CPU there are as many as ``NPROC`` says, else one for each core.

On a GPU each process takes memory as it needs it, so that several workers share the card.
"""

import os

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
if jax.default_backend() == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for processes that tests start, whose bits are compared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU; the default device is {device.device_kind}"))
