"""Device time of jitted functions, from CUPTI's record of every kernel; benchmarks that compile side by side.

Compiling takes most of a benchmark's time. So programs are compiled on threads before any runs, and several
benchmarks (or shapes of one) may be started at once: their measurements wait until no other compiles or measures.
"""

import argparse
import contextlib
import fcntl
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels import dispatch

_Key = TypeVar("_Key", bound=Hashable)
# Of one user: a name in a folder that all share could be taken by another.
_LOCK = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fireq-jax-benchmark.lock"


def compile_all(
    programs: Mapping[_Key, tuple[Any, Sequence[Any]]], options: Mapping[str, str] | None = None
) -> dict[_Key, Any]:
    """{key: (jitted function, arguments or their shapes)} -> {key: its compiled program}; ``options`` are XLA's."""
    with _locked(fcntl.LOCK_SH):
        lowered = {key: function.lower(*arguments) for key, (function, arguments) in programs.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda program: program.compile(compiler_options=options), lowered.values())
            return dict(zip(lowered, compiled, strict=True))


def alone() -> contextlib.AbstractContextManager[None]:
    """The device for a measurement, once no other process measures or compiles (compiling tunes on the device)."""
    return _locked(fcntl.LOCK_EX)


@contextlib.contextmanager
def _locked(operation: int) -> Iterator[None]:
    _LOCK.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _LOCK.open("w") as file:
        fcntl.flock(file, operation)
        yield


def require_hopper(parser: argparse.ArgumentParser) -> None:
    """End with a usage error where the kernels cannot run."""
    if dispatch.compute_capability() != (9, 0):
        parser.error(f"needs an NVIDIA Hopper GPU; the default device is {dispatch.default_device().device_kind!r}")


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that ends with its result on the device; compiled beforehand."""
    times = []
    with alone():
        jax.block_until_ready(call())
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def kernel_times(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel that ``run`` starts, in order."""
    from jax._src.lib import mosaic_gpu  # Only there with JAX's CUDA plugin.

    library: Any = mosaic_gpu
    cupti = library._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        records = cupti._cupti_get_timings(True)
    return [(name, milliseconds * 1e3) for name, milliseconds in records]


def device_time(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], min_us: float = 20_000.0) -> float:
    """Median microseconds of one ``call``, all its kernels together.

    Args:
        call: a jitted function, or a compiled one, that starts the same kernels for every argument.
        arguments: visited in turn, so that no call finds the last one's weights in the L2 cache.
        min_us: time to measure for; short bursts run at clocks that longer ones do not keep.
    """
    for args in arguments[:2]:
        jax.block_until_ready(call(*args))

    def sweep(count: int) -> list[float]:
        def run() -> Any:
            last = None
            for i in range(count):
                last = call(*arguments[i % len(arguments)])
            return last

        records = kernel_times(run)
        kernels = len(records) // count
        if kernels * count != len(records) or not kernels:
            raise RuntimeError(f"{len(records)} kernels in {count} calls: {sorted({name for name, _ in records})}")
        return [sum(us for _, us in records[i : i + kernels]) for i in range(0, len(records), kernels)]

    with alone():
        first = statistics.median(sweep(5))
        count = max(10, min(400, int(min_us / first)))
        times = sweep(count)
    return statistics.median(times[len(times) // 5 :])
