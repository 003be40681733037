"""JSON objects in files: read with errors that name the file, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    """
    aside, text = path.with_name(path.name + ".tmp"), json.dumps(fields, indent=2, allow_nan=False)
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)
