"""What ``fireq-generate`` is asked: prompts of the command line, of a file, or of standard input, as token ids."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireq_jax.config_fields import quote
from fireq_jax.generation import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
_STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text, or messages of a chat.

    Attributes:
        given: the text, or role and content of each message.
        where: what it came from, for messages of errors.
    """

    given: str | tuple[Message, ...]
    where: str = "--prompt"

    @property
    def fields(self) -> dict[str, Any]:
        """The same as a line of JSON says it."""
        return {"prompt": self.given} if isinstance(self.given, str) else {"messages": list(self.given)}

    @property
    def shown(self) -> str:
        """What stands above its continuation."""
        return self.given if isinstance(self.given, str) else self.given[-1]["content"]

    def encoded(self, tokenizer: "PreTrainedTokenizerBase", model: str, *, chat: bool, system: str | None) -> list[int]:
        """Its token ids; by the tokenizer's chat template if it has messages, or is the one of a ``chat``.

        Args:
            tokenizer: the model's.
            model: its name, for messages of errors.
            chat: whether a text is a user's message.
            system: a system message, for messages without one.

        Raises:
            ValueError: if the template is missing or rejects them, or nothing is left to continue.
        """
        if isinstance(self.given, str) and not chat:
            return self._ids(tokenizer, self.given, add_special_tokens=True)
        messages = [{"role": "user", "content": self.given}] if isinstance(self.given, str) else list(self.given)
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        advice = "leave out --chat" if chat else f"{self.where} has messages; give it a prompt"
        return self._ids(tokenizer, rendered(tokenizer, messages, model, advice), add_special_tokens=False)

    def _ids(self, tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.where}: prompt {text!r} is no Unicode text: {error}") from error
        ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        if not ids:
            raise ValueError(f"{self.where}: prompt {text!r} has no tokens; expected at least one")
        return ids


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], model: str, advice: str) -> str:
    """The text of messages, by the tokenizer's chat template; ``advice`` is what to do without one.

    Raises:
        ValueError: if there is none, or it rejects them.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {model} has no chat template; {advice}")
    return chat.render(tokenizer, messages, model)


def read_prompts(file: str) -> list[Prompt]:
    """A prompt a line; empty lines are none.

    Args:
        file: lines of JSON if its name ends with .jsonl, objects with a ``prompt``, or ``messages`` of role and
            content; else lines of text. "-" is standard input, which is JSON if its first line begins with "{".

    Raises:
        ValueError: naming file and line, for a line that is no prompt; or if there is none.
    """
    if file == _STANDARD_INPUT:
        prompts = _parsed(sys.stdin, "standard input", as_json=None)
    else:
        try:
            with Path(file).open(encoding="utf-8-sig") as lines:
                prompts = _parsed(lines, file, as_json=file.endswith(".jsonl"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not prompts:
        raise ValueError(f"{file} has no prompts; expected one a line")
    return prompts


def _parsed(lines: Iterable[str], name: str, *, as_json: bool | None) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not (text := line.rstrip("\r\n")).strip():
            continue
        as_json = text.startswith("{") if as_json is None else as_json
        where = f"{name}:{number}"
        prompts.append(_of_json(text, where) if as_json else Prompt(text, where))
    return prompts


def _of_json(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is {quote(line)}; expected JSON: {error}") from error
    names = {"prompt", "messages"} & (fields.keys() if isinstance(fields, dict) else set())
    if len(names) != 1:
        raise ValueError(f"{where} is {quote(line)}; expected an object with either prompt or messages")
    if isinstance(text := fields.get("prompt"), str):
        return Prompt(text, where)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"{where} is {quote(line)}; expected a text as prompt, or a role and a text as content each")
    return Prompt(tuple({"role": each["role"], "content": each["content"]} for each in messages), where)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
