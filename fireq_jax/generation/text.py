"""From new tokens to text, a piece for each, up to the strings that end it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of the prompt that the first new token is decoded after; many tokenizers drop a text's first space.
_CONTEXT = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of one sequence, as its tokens come.

    Only the tokens since the last complete piece, and that piece for context, are decoded again.

    Attributes:
        stopped: whether a stop string has come; later tokens have no text.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        """A sequence that begins with ``prompt_ids``, whose text is not returned.

        Args:
            tokenizer: the model's.
            prompt_ids: what the new tokens follow.
            stop_strings: the text ends before the first of these.
        """
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._held = ""  # may be the beginning of a stop string
        ids, width = list(prompt_ids), _CONTEXT
        # Of a character that the cut splits, byte-fallback decoders spoil the whole run of bytes that follows.
        while width < len(ids) and self._decoded(ids[-width:]).startswith(_INCOMPLETE):
            width *= 2
        self._ids = ids[-width:]
        self._context, self._done = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Text that a further token makes certain; "" while a character, or what may be a stop string, is not whole."""
        if self.stopped:
            return ""
        ids = self._ids
        ids.append(int(token))
        before, text = self._decoded(ids[self._context : self._done]), self._decoded(ids[self._context :])
        if text.endswith(_INCOMPLETE):
            return ""
        # What leaves no text, a special token, is no context: after nothing a first space would be dropped.
        if len(text) > len(before):
            self._context = self._done
        self._done = len(ids)
        return self._before_stop(text[len(before) :])

    def finish(self) -> str:
        """The rest, when no token follows: incomplete characters too."""
        if self.stopped:
            return ""
        ids = self._ids
        rest = self._decoded(ids[self._context :])[len(self._decoded(ids[self._context : self._done])) :]
        self._context = self._done = len(ids)
        text = self._before_stop(rest)
        held, self._held = self._held, ""
        return text + held

    def _before_stop(self, piece: str) -> str:
        """Of the text that is held, and a piece after it, what comes before a stop string and cannot be part of one."""
        if not self._stop_strings:
            return piece
        text = self._held + piece
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop_strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def check_stop_strings(given: Any, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Raise ValueError for stop strings that are none, or that cannot be found without a tokenizer."""
    if given is None:
        return
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, Sequence) or not all(isinstance(stop, str) and stop for stop in strings):
        raise ValueError(f"stop_strings is {given!r}; expected a text that is not empty, or a list of such")
    if strings and tokenizer is None:
        raise ValueError(f"stop_strings is {given!r}, and there is no tokenizer; pass the model's as tokenizer")


def split_stop_strings(
    given: str | Sequence[str] | None, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings to look for in the text, and the ids of those that are special tokens, which leave no text.

    Raises:
        ValueError: for one with a special token among other text.
    """
    strings = (given,) if isinstance(given, str) else tuple(given or ())
    if not strings:
        return (), ()
    assert tokenizer is not None
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in strings:
        if stop not in special and (inside := [token for token in special if token in stop]):
            raise ValueError(f"stop_strings has {stop!r}; expected {inside[0]!r} alone, which is a special token")
    return (
        tuple(stop for stop in strings if stop not in special),
        tuple(special[stop] for stop in strings if stop in special),
    )


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that a stop string may begin with, without being whole."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
