"""Chat templates: programs that come with a model, run within limits of time and memory."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
MEMORY = 1 << 29  # bytes
MOST_CHARACTERS = 10_000_000


class _OutOfTime(BaseException):
    """No Exception: Jinja's compiler takes these for constants that it cannot compute yet."""


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]], where: str | Path, *, ask: bool = True
) -> str:
    """The prompt that a tokenizer's chat template makes of messages.

    transformers runs templates in Jinja's sandbox, which keeps them from files and from Python; a template that loops
    or allocates for too long is stopped here.

    Args:
        tokenizer: with a chat template.
        messages: role and content each.
        where: the model, for messages of errors.
        ask: whether the text ends where an answer begins, rather than with the last message.

    Raises:
        ValueError: naming ``where``, if the template is none, rejects the messages, or exceeds a limit.
    """
    try:
        with bounded():
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except _OutOfTime as error:
        raise ValueError(f"{where}: the chat template is not done after {SECONDS:g} s") from error
    except MemoryError as error:
        raise ValueError(f"{where}: the chat template takes more than {MEMORY:,} bytes") from error
    except Exception as error:  # of whatever kind its expressions raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: the chat template rejects the messages: {reason}") from error
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise ValueError(f"{where}: the chat template makes more than {MOST_CHARACTERS:,} characters of the messages")
    return text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise ``_OutOfTime`` after ``SECONDS`` here, and MemoryError where this process grows by ``MEMORY``.

    Time is bounded on the main thread only, which alone receives signals; memory on Linux.
    """
    with contextlib.ExitStack() as limits:
        if (pages := Path("/proc/self/statm")).exists():
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
            lower = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
            limits.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (min([most, *lower]), hard))
        if threading.current_thread() is threading.main_thread():
            limits.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _stop))
            limits.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            # Again each second: what is raised in a destructor is lost.
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
        yield


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _OutOfTime
