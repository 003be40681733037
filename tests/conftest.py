"""Tests marked ``gpu`` skip themselves unless JAX's default device is an NVIDIA Hopper GPU.

Nothing here picks a platform: on a machine with a GPU, ``JAX_PLATFORMS=cpu pytest`` runs the
suite on the CPU.

On a CPU LLVM does not optimize, for tests compile more than they compute and take two thirds of
the time so; XLA's own passes are as always. ``JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest`` has both.

What one test has compiled no other test of the run, and no process that it starts, compiles again: a third of
the suite's time. ``JAX_COMPILATION_CACHE_DIR=FOLDER pytest`` keeps it for the next run.

Pallas' GPU interpreter blocks one of XLA's threads for each warpgroup that waits, and hangs when none
is left. On a CPU there are as many as ``NPROC`` says, else one for each core.

On a GPU each process takes memory as it needs it, so that several workers share the card.
"""

import os
import tempfile
from collections.abc import Iterator

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
if jax.default_backend() == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for processes that tests start, whose bits are compared

_SHARED = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def pytest_configure(config: pytest.Config) -> None:
    # Workers find the first process's variables.
    if jax.default_backend() != "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="jax-compiled-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    for name, value in {**_SHARED, "jax_compilation_cache_dir": folder.name}.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Compile as if no process had before: for tests that count compilations."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU; the default device is {device.device_kind}"))
