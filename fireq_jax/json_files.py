"""JSON objects in files: read with errors that name the file, written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fireq_jax.whole_files import write_whole

_SEAL = "checksum"


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
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
