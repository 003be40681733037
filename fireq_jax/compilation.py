"""Compilation: options of functions that run a few times for each, and where commands keep what they compiled."""

import os
from pathlib import Path

import jax

# XLA tunes a Triton matmul by compiling and timing dozens of it, which takes longer here than it saves. (A CPU
# ignores options of GPUs; JAX refuses options of a function that is called inside another jitted one.)
COMPILE_QUICKLY: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}


def keep_programs() -> None:
    """On a GPU, keep compiled programs for later processes in ``$XDG_CACHE_HOME/fireq-jax``, by default ~/.cache.

    JAX's own settings win: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing. A CPU's programs are quick to make, and good for no other CPU.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None or jax.default_backend() != "gpu":
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "fireq-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
