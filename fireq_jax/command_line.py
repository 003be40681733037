"""What the commands say on stderr, and how they end: with an exit code and one line, not with a traceback."""

import argparse
import contextlib
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from types import FrameType
from typing import NoReturn

import jax

from fireq_jax.devices import as_default
from fireq_jax.version import __version__

# What users can put right: arguments and files, what a named kernel cannot run, packages that are not installed.
_EXPECTED = ValueError, NotImplementedError, OSError, ImportError
_INTERRUPTED = 128 + signal.SIGINT
_OURS = "fireq_jax", "pallas_kernels", "checkpoints_convert"
_interrupted = threading.Event()

# What a text option takes (``text_data``).
SOURCES = (
    "text file, .jsonl, .json or .parquet; a folder of .txt, .jsonl and .parquet files; or a data set of the datasets "
    "library, NAME[:CONFIG[:SPLIT]]"
)


def add_text_options(parse: argparse.ArgumentParser) -> None:
    """``--text-field`` and ``--join``: how a text source becomes documents."""
    parse.add_argument(
        "--text-field",
        default="text",
        metavar="FIELD",
        help="field of objects and columns that holds the text, or a chat's messages (default: text, else messages)",
    )
    parse.add_argument(
        "--join", action="store_true", help="join documents by blank lines into one text, as is usual for WikiText"
    )


def add_common_options(parse: argparse.ArgumentParser, *, default: int = logging.WARNING) -> None:
    """``--version``; ``--device``, and ``--verbose`` and ``--quiet`` as ``args.log_level``, for :func:`exit_code`."""
    version = f"%(prog)s {__version__} (jax {metadata.version('jax')}, Python {platform.python_version()})"
    parse.add_argument("--version", action="version", version=version)
    parse.add_argument("--device", metavar="NAME", help="cpu, gpu, or one of several, gpu:1 (default: JAX's first)")
    group = parse.add_mutually_exclusive_group()
    add = group.add_argument
    add("-v", "--verbose", dest="log_level", action="store_const", const=logging.INFO, default=default,
        help="say more on stderr: what things cost, why an op takes plain XLA")  # fmt: skip
    add("-q", "--quiet", dest="log_level", action="store_const", const=logging.ERROR, help="say nothing but errors")


def exit_code(
    command: str, run: Callable[[], None], log_level: int = logging.WARNING, device: str | None = None
) -> int:
    """``run``'s exit code: 0, 2 for invalid input or too little memory, 130 if interrupted, 141 if stdout is closed.

    What is logged meanwhile, from ``log_level`` on, goes to stderr; other packages' from WARNING on. ``device`` is
    JAX's default meanwhile.
    """
    try:
        with _logging_to_stderr(log_level), _interruptible(), as_default(device):
            run()
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at exit
    except BrokenPipeError:
        # What is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except _EXPECTED as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not (message := str(error)).startswith("RESOURCE_EXHAUSTED"):
            raise
        print(f"{command}: {message.splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    root, loggers = logging.getLogger(), [logging.getLogger(package) for package in _OURS]
    # Without absl's, which is set up when Orbax is imported. Handlers of other types are not for stderr.
    before = root.level, root.handlers[:], [logger.level for logger in loggers]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.handlers[:] = [each for each in root.handlers if type(each) is not logging.StreamHandler] + [handler]
    root.setLevel(max(level, logging.WARNING))
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for logger, own in zip(loggers, before[2], strict=True):
            logger.setLevel(own)


def leave(code: int) -> NoReturn:
    """End the process with a command's exit code.

    If it was interrupted, at once: threads of XLA's and Orbax's go on, and crash in an interpreter that is torn down.
    """
    if code == _INTERRUPTED:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and what it raised was lost, as in a destructor or a callback."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once; if that gets nowhere, a second one ends the process there and then."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        # Not by a handler of ours, which would wait for a compilation that runs.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _interrupted.set()
        raise KeyboardInterrupt

    # A thread's command is not what Ctrl-C ends; and what was started to ignore Ctrl-C goes on to.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    try:
        with on_interrupt(interrupt):
            yield
    finally:
        _interrupted.clear()


@contextlib.contextmanager
def on_interrupt(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C calls ``handler``; on the main thread alone, for elsewhere none can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
