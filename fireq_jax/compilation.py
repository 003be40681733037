"""Compilation: options of functions that run a few times for each, and where processes keep what they compiled."""

import functools
import hashlib
import inspect
import logging
import os
import stat
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.export

from pallas_kernels.codebooks import CODEBOOKS

# XLA tunes a Triton matmul by compiling and timing dozens of it, which takes longer here than it saves. (A CPU
# ignores options of GPUs; JAX refuses options of a function that is called inside another jitted one.)
COMPILE_QUICKLY: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}

_P = ParamSpec("_P")
_R = TypeVar("_R")
_PACKAGES = "fireq_jax", "pallas_kernels"
# Where classes may be from: their code, or its version, is part of a lowered program's name.
_KNOWN = *_PACKAGES, "builtins", "flax", "jax"
logger = logging.getLogger(__name__)


def keep_programs() -> None:
    """On a GPU, keep compiled programs for later processes in ``$XDG_CACHE_HOME/fireq-jax``, by default ~/.cache.

    JAX's own settings win: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing. A CPU's programs are quick to make, and good for no other CPU.
    A folder that others can write to is not used, and a warning in the log says so.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None or jax.default_backend() != "gpu":
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(cache) / "fireq-jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("compiled programs cannot be kept: %s", error)
        return
    if not _is_private(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cached_export(*static: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator of a function that is to be jitted: a cache of its exports, so that one process lowers it for all.

    JAX's compilation cache spares XLA's work, but not Python's: tracing, and building the kernels' MLIR, which for a
    large model take longer. So the exported StableHLO is stored beside that cache (if there is one, in a local
    folder), under a name that depends on all it was made from: this project's code, the versions of JAX and Flax,
    JAX's settings, the device, the ``static`` arguments and the others' types. A function that cannot be exported is
    traced by every process, and so is one of a model with classes of somebody else's, or one that is given functions,
    whose code may change.

    Args:
        static: names of the arguments that are no arrays. A ``repr`` of each must say it whole; a model's structure
            (``jax.tree.structure``) does. The others are pytrees that ``jax.export`` can serialize.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            arrays = signature.bind(*args, **kwargs).arguments
            fixed = {name: arrays.pop(name) for name in static}
            if not jax.sharding.get_abstract_mesh().empty:
                # Another program than without a mesh, which its name would not say. Explicit axes become automatic in
                # it, for models do not say how each of their arrays is sharded.
                untyped: Callable[..., Any] = function
                spread: Any = jax.sharding.auto_axes(lambda x: untyped(**x, **fixed), out_sharding=jax.P())
                return spread(arrays)
            if (folder := _folder()) is None:
                return function(*args, **kwargs)
            exported = _load_or_export(folder, function, fixed, jax.eval_shape(lambda x: x, arrays))
            result: Any = function(*args, **kwargs) if exported is None else exported.call(**arrays)
            return result

        return run

    return decorate


def _load_or_export(
    folder: Path, function: Callable[..., Any], fixed: dict[str, Any], types: dict[str, Any]
) -> jax.export.Exported | None:
    """``function`` with ``fixed`` arguments, lowered for others of ``types``; None where it cannot be cached."""
    name = function.__name__.lstrip("_")
    if foreign := next(_foreign(fixed), None):
        logger.info("%s is lowered by each process anew: the code of %s may change", name, foreign)
        return None
    file = folder / f"{name}-{_digest(fixed, types)}"
    exported = _read(file)
    if exported is None:
        try:
            exported = jax.export.export(jax.jit(functools.partial(function, **fixed)))(**types)
            _write(file, exported.serialize())
        except (ValueError, NotImplementedError) as error:
            logger.info("%s is lowered by each process anew: %s", name, error)
            return None
    return exported


def _folder() -> Path | None:
    """Where exports are cached, if they are."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    if not cache or "://" in cache or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    folder = Path(cache) / "lowered"
    return folder if _is_private(folder) else None


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have written there, for to load a program is to run it; the log says who could."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return True
    if status.st_uid not in (0, os.geteuid()):
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o}; expected 0700)"
    else:
        return True
    _warn(f"{folder} {problem}: compiled programs are neither kept there nor read from it")
    return False


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


def _classes(fixed: dict[str, Any]) -> Iterator[type]:
    """Classes of all nodes of the trees among the arguments."""
    trees = [value for value in fixed.values() if isinstance(value, jax.tree_util.PyTreeDef)]
    while trees:
        tree = trees.pop()
        if (data := tree.node_data()) is not None:
            yield data[0]
        trees += tree.children()


def _foreign(fixed: dict[str, Any]) -> Iterator[Any]:
    """Classes and functions among the arguments whose code is not part of a lowered program's name."""
    yield from (kind for kind in _classes(fixed) if kind.__module__.split(".")[0] not in _KNOWN)
    yield from (leaf for leaf in jax.tree.leaves(fixed) if callable(leaf))


def _digest(fixed: dict[str, Any], types: dict[str, Any]) -> str:
    device = jax.devices()[0]
    settings = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name)
    versions = [metadata.version(package) for package in ("jax", "jaxlib", "flax")]
    code = _sources(), dict(CODEBOOKS), versions
    described = repr((*code, device.platform, device.device_kind, settings, fixed, types))
    return hashlib.sha256(described.encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """A digest of the code that programs are made from."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(file for package in _PACKAGES for file in (root / package).rglob("*.*")):
        if file.suffix in (".py", ".json"):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> jax.export.Exported | None:
    try:
        return jax.export.deserialize(bytearray(file.read_bytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # Whatever is wrong with the file, the program can be made again.
        logger.warning("%s cannot be read, and is made again: %s", file, error)
        return None


def _write(file: Path, serialized: bytearray) -> None:
    """Write to another name, then rename: other processes may write the same file, and none reads half of one."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.write_bytes(serialized)
        aside.replace(file)
    except OSError as error:
        logger.warning("a lowered program cannot be stored: %s", error)
