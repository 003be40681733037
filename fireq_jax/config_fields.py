"""What the configs check when they are made or read: the names, types and ranges of their fields."""

import dataclasses
import reprlib
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16

Ranges = Mapping[str, tuple[float, float]]


def quote(value: Any) -> str:
    """``repr(value)`` for a message: short however large or deeply nested the value is."""
    return _SHORT.repr(value)


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; a whole number is a number too, and a bool is none."""
    return isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)


def check_types(config: Any, ranges: Ranges | None = None) -> None:
    """:func:`check_values` for all fields of a dataclass."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    check_values(type(config), values, ranges or {})


def check_values(cls: type, values: Mapping[str, Any], ranges: Ranges, names: Mapping[str, str] | None = None) -> None:
    """Raise ValueError unless numbers and flags are of the types of a dataclass's fields and in their ranges.

    Args:
        cls: the dataclass.
        values: field -> value; other fields are not checked.
        ranges: field -> the least and the largest number it (or each of a tuple) may be. NaN is in no range.
        names: field -> what a message calls it, where that is another name.
    """
    for field in dataclasses.fields(cls):
        options = get_args(field.type) or (field.type,)
        kind = next((kind for kind in _KINDS if kind in options), None)
        if kind is None or field.name not in values or (values[field.name] is None and type(None) in options):
            continue
        value, name = values[field.name], (names or {}).get(field.name, field.name)
        always = get_origin(field.type) is tuple
        several = always or any(get_origin(option) is tuple for option in options)
        if always and not isinstance(value, tuple):
            raise ValueError(f"{name} is {quote(value)}; expected a tuple")
        numbers: tuple[Any, ...] = value if several and isinstance(value, tuple) else (value,)
        if not all(is_a(number, kind) for number in numbers):
            raise ValueError(f"{name} is {quote(value)}; expected {_KINDS[kind]}")
        if field.name in ranges:
            low, high = ranges[field.name]
            if not all(low <= number <= high for number in numbers):
                raise ValueError(f"{name} is {quote(value)}; expected {low} to {high}")


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """``value``, which must be a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {quote(value)}; expected an object")
    return value


def pairs(value: Any, name: str, meaning: str) -> list[tuple[Any, Any]]:
    """``value``, which must be a list or tuple of pairs, or an object of them; ``meaning`` is of a pair."""
    found = list(value.items()) if isinstance(value, Mapping) else value
    several = list | tuple
    if not isinstance(found, several) or not all(isinstance(pair, several) and len(pair) == 2 for pair in found):
        raise ValueError(f"{name} is {quote(value)}; expected pairs of {meaning}, or an object")
    return [(first, second) for first, second in found]


def check_names(cls: type, fields: Mapping[str, Any], *, may_lack: bool = False) -> None:
    """Raise ValueError unless ``fields`` are the dataclass's, all of them unless they ``may_lack`` some."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown {cls.__name__} keys {quote(unknown)}; expected some of {sorted(known)}")
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
