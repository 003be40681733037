"""What the configs check when they are made or read: the names and types of their fields."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; a whole number is a number too, and a bool is none."""
    return isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)


def check_types(config: Any) -> None:
    """Raise ValueError unless a dataclass's numbers and flags are of their fields' types."""
    for field in dataclasses.fields(config):
        value, options = getattr(config, field.name), get_args(field.type) or (field.type,)
        kind = next((kind for kind in _KINDS if kind in options), None)
        if kind is None or (value is None and type(None) in options):
            continue
        if not all(is_a(each, kind) for each in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field.name} is {value!r}; expected {_KINDS[kind]}")


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """``value``, which must be a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected an object")
    return value


def check_names(cls: type, fields: Mapping[str, Any], *, may_lack: bool = False) -> None:
    """Raise ValueError unless ``fields`` are the dataclass's, all of them unless they ``may_lack`` some."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown {cls.__name__} keys {unknown}; expected some of {sorted(known)}")
    if not may_lack and (missing := sorted(known - set(fields))):
        raise ValueError(f"{cls.__name__} keys {missing} are missing; expected all of {sorted(known)}")


def check_kinds(config: Any) -> None:
    """Raise ValueError unless a dataclass's other fields hold what they say: a choice, a text, a path, a config."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if get_origin(kind) is Literal:
            if not (isinstance(value, str) and value in get_args(kind)):
                raise ValueError(f"{field.name} is {value!r}; expected one of {get_args(kind)}")
        elif get_origin(kind) in (None, UnionType):
            kinds = [option for option in get_args(kind) or (kind,) if isinstance(option, type)]
            if _KINDS.keys().isdisjoint(kinds) and not isinstance(value, tuple(kinds)):
                names = " or ".join("None" if option is type(None) else option.__name__ for option in kinds)
                raise ValueError(f"{field.name} is {value!r}; expected {names}")
