"""Text as it is made, and a chat in the terminal."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from fireq_jax.command_line import on_interrupt
from fireq_jax.generation.generate import stream
from fireq_jax.generation.prompts import Message, Prompt
from fireq_jax.generation.text import TextStream, split_stop_strings
from fireq_jax.models.kv_cache import KVCache
from fireq_jax.models.llama import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Slots of a chat's cache at first; doubled when the chat has grown out of it, so that few sizes are compiled for.
CHAT_SLOTS = 2048
COMMANDS = "/reset forgets all, /system TEXT sets the system message, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


class Answer(NamedTuple):
    """A text and its tokens; when they came, in seconds, the call's beginning first; and the cache that they leave."""

    text: str
    tokens: list[int]
    times: list[float]
    cache: KVCache

    @property
    def speed(self) -> str:
        """The same in words."""
        times, count = self.times, len(self.tokens)
        speed = f"first after {times[1] - times[0]:.2f} s"
        if count > 2:
            # The second waits for the decoding step's compilation.
            rate = (count - 2) / max(times[-1] - times[2], 1e-9)
            speed += f", second after {times[2] - times[1]:.2f} s, then {rate:.1f} tokens/s"
        return speed


def print_stream(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[int],
    options: dict[str, Any],
    enough: Callable[[], bool] = lambda: False,
) -> Answer:
    """Continue a prompt, printing the new text as it comes.

    Args:
        model: what to generate from.
        tokenizer: its own.
        prompt: token ids.
        options: of ``generate``, besides the prompt.
        enough: asked after each token whether to stop there.
    """
    text = TextStream(tokenizer, prompt, split_stop_strings(options.get("stop_strings"), tokenizer)[0])
    parts, tokens, times = [], [], [time.perf_counter()]

    def show(part: str) -> None:
        parts.append(part)
        print(part, end="", flush=True)

    steps = stream(model, [prompt], **options)
    for step in steps:
        times.append(time.perf_counter())
        tokens.append(int(step.tokens[0]))
        show(text.push(tokens[-1]))
        if enough():
            break
    show(text.finish())
    print()
    return Answer("".join(parts), tokens, times, steps.cache)


class Chat:
    """A conversation: what was said, and the answers of a model."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        options: dict[str, Any],
        system: str | None = None,
    ) -> None:
        """A chat in which nothing was said.

        Args:
            model: who answers.
            tokenizer: its own.
            name: the model's, for messages of errors.
            options: of ``generate``; ``max_new_tokens`` of each answer.
            system: the system message.
        """
        self._model, self._tokenizer, self._name, self._options = model, tokenizer, name, options
        self.system, self.messages, self._slots = system, list[Message](), options["cache_capacity"]
        self._held: tuple[list[int], KVCache] | None = None  # what the cache holds, and the cache

    def answer(self, text: str, enough: Callable[[], bool]) -> Answer:
        """Print what the model says to ``text``, and remember both.

        Raises:
            ValueError: if the template rejects the messages, or the chat is longer than the model's positions.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = Prompt(tuple(said)).encoded(self._tokenizer, self._name, chat=True, system=self.system)
        positions = self._model.config.max_position_embeddings
        if (left := positions - len(prompt)) < 1:
            raise ValueError(f"the chat has {len(prompt)} tokens, and the model {positions} positions; /reset it")
        new_tokens = min(self._options["max_new_tokens"], left)
        while self._slots < len(prompt) + new_tokens:
            self._slots *= 2
        sizes = {"max_new_tokens": new_tokens, "cache_capacity": self._slots, "cache": self._cache_for(prompt)}
        answer = print_stream(self._model, self._tokenizer, prompt, self._options | sizes, enough)
        self._held = prompt + answer.tokens[:-1], answer.cache
        self.messages = [*said, {"role": "assistant", "content": answer.text}]
        return answer

    def _cache_for(self, prompt: list[int]) -> KVCache | None:
        """As much of the last answer's cache as a prompt begins with, but for its last token, which makes the next."""
        if self._held is None:
            return None
        held, cache = self._held
        differ = (i for i, pair in enumerate(zip(held, prompt, strict=False)) if pair[0] != pair[1])
        same = min(next(differ, len(held)), len(prompt) - 1)
        return cache.cut([same]) if same > 0 else None


def run_chat(chat: Chat, report: Callable[[Answer], None]) -> None:
    """Read messages and print answers until ``/exit`` or the end of the input.

    Args:
        chat: that goes on.
        report: called after each answer.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() has its line editing and history then
    while (line := _read_line()) is not None:
        text = line.strip()
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            chat.messages = []
        elif command == "/system":
            chat.system = rest.strip() or None
        elif command.startswith("/"):
            print(f"{command} is unknown: {COMMANDS}", file=sys.stderr)
        elif text:
            try:
                with _stoppable() as stopped:
                    answer = chat.answer(text, stopped.is_set)
            except ValueError as error:
                print(error, file=sys.stderr)
            else:
                report(answer)


def _read_line() -> str | None:
    """A line of the input; None at its end, and "" after Ctrl-C."""
    try:
        with _raising():
            return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _raising() -> contextlib.AbstractContextManager[None]:
    return on_interrupt(signal.default_int_handler)


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no computation is left half done; a second one raises KeyboardInterrupt."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    with on_interrupt(stop):
        yield stopped
