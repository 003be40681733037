"""JSON objects in files: read with errors that name the file, written whole or not at all."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fireq_jax.config_fields import quote
from fireq_jax.whole_files import write_whole

_SEAL = "checksum"
_MOST_DIGITS = 100  # of a whole number; Python itself refuses to read more than 4300


def is_file(path: Path) -> bool:
    """Whether there is a file to read.

    Raises:
        ValueError: if what is there is none: a folder, a pipe (which would wait for a writer), a link to nothing.
    """
    try:
        if not (path.exists() or path.is_symlink()):
            return False
        if path.is_file():
            return True
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    raise ValueError(f"{path} is no regular file, or a link to one that is missing; expected a file")


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Put the file that a ValueError is about before its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        ValueError: if the file is missing, holds something else, NaN, an infinity or a number beyond
            float64's range, or one key twice with different values.
    """
    if not is_file(path):
        raise ValueError(f"{path} is missing; expected a JSON file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object, parse_int=_whole_number)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; expected an object of few levels") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}; expected an object")
    return fields


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write aside, then rename: the file is never half there.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have.
        OSError: naming the file.
    """
    text = json.dumps(fields, indent=2, allow_nan=False)
    write_whole(path, lambda file: file.write(f"{text}\n".encode()))


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """:func:`write_json` of ``fields`` with a checksum of them, for :func:`read_sealed`."""
    write_json(path, {**fields, _SEAL: _checksum(fields)})


def read_sealed(path: Path, advice: str, *, verify: bool = True) -> dict[str, Any]:
    """What :func:`write_sealed` wrote.

    Raises:
        ValueError: with ``advice``, if it is something else by now and that is to be verified.
    """
    try:
        fields = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    stated = fields.pop(_SEAL, None)
    if verify and stated != (found := _checksum(fields)):
        raise ValueError(f"{path} has changed: SHA-256 of its entries is {found:.12}..., expected {stated}; {advice}")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values, which json would otherwise take as they come."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{quote(key)} is {number} or out of range; expected a finite number")
        if fields.setdefault(key, value) != value:
            raise ValueError(f"{quote(key)} is there twice, as {quote(fields[key])} and {quote(value)}")
    return fields


def _whole_number(digits: str) -> float:
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf
