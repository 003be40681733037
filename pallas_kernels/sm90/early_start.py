"""Starting a kernel before the one before it has ended: CUDA's programmatic dependent launch.

A kernel's launch and its barriers need nothing from the kernels before it, nor do prefetches into the
L2 cache: that is coherent, so they cannot bring anything stale. All else comes after the wait. A
kernel that waits ends after all kernels before it, so that waiting for one is waiting for all.

JAX launches a kernel so from 0.11 on if it waits, and not from a CUDA graph; elsewhere the wait is free.
"""

from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu

# Read when a kernel is traced. Off: neither its speed nor its work on a GPU has been seen.
ENABLED = False


def begin(prefetch: Callable[[], None] | None = None) -> None:
    """What a kernel does first: let the next one start, ``prefetch``, and wait for those before."""
    if not ENABLED:
        return
    plgpu.griddepcontrol_launch_dependents()
    if prefetch is not None:
        prefetch()
    plgpu.griddepcontrol_wait()
