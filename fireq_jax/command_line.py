"""How the commands end: with an exit code and one line of what was wrong, not with a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable

import jax

# What users can put right: arguments and files, what a named kernel cannot run, packages that are not installed.
_EXPECTED = ValueError, NotImplementedError, OSError, ImportError


def exit_code(command: str, run: Callable[[], None]) -> int:
    """``run``'s exit code: 0, 2 for invalid input or too little memory, 130 if interrupted, 141 if stdout is closed."""
    logging.basicConfig(format="%(message)s")
    try:
        run()
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at exit
    except BrokenPipeError:
        # What is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except _EXPECTED as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not (message := str(error)).startswith("RESOURCE_EXHAUSTED"):
            raise
        print(f"{command}: {message.splitlines()[0]}", file=sys.stderr)
        return 2
    return 0
