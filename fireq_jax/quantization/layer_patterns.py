"""Layers of a model by patterns of their names (``fnmatch``), as :class:`QuantizationConfig` holds them.

The model computes some of a checkpoint's linear layers in one. Such a layer goes by its own name, or by patterns that
match the names of all that it is made of: "*.self_attn.qkv_proj", "*.self_attn.[qkv]_proj".
"""

import difflib
import fnmatch
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from fireq_jax.config_fields import pairs, quote

# What a checkpoint calls the parts of a fused layer.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

FormatT = TypeVar("FormatT", bound=str)
Choices = tuple[tuple[str, FormatT], ...]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means the layer ``name``."""
    parts = parts_of(name)
    return fnmatch.fnmatchcase(name, pattern) or (
        bool(parts) and all(fnmatch.fnmatchcase(part, pattern) for part in parts)
    )


def parts_of(name: str) -> list[str]:
    """The checkpoint's names of what the layer ``name`` computes in one; none if it is one of the checkpoint's."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(last, ())]


def chosen(name: str, choices: Choices[FormatT], default: FormatT) -> FormatT:
    """What the last pattern that means the layer ``name`` chooses for it, or ``default``."""
    return next((value for pattern, value in reversed(choices) if matches(name, pattern)), default)


def as_patterns(field: str, value: Any) -> tuple[str, ...]:
    """``value``, which must be a list or tuple of patterns."""
    if not isinstance(value, list | tuple) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{field} is {value!r}; expected a tuple of patterns")
    return tuple(value)


def as_choices(field: str, value: Any, formats: Collection[FormatT]) -> Choices[FormatT]:
    """``value``, which must be pairs of a pattern and one of ``formats``, or a mapping."""
    choices = pairs(value, field, "a pattern and a format")
    for pattern, name in choices:
        if not isinstance(pattern, str):
            raise ValueError(f"{field} has {quote(pattern)}; expected a pattern")
        if not isinstance(name, str) or name not in formats:
            raise ValueError(f"{field} of {pattern!r} is {quote(name)}; expected one of {tuple(formats)}")
    return tuple(choices)


def check_patterns(field: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise ValueError for a pattern that means none of the layers ``names``, or only parts of one."""
    for pattern in patterns:
        for name in names:
            parts = [part for part in parts_of(name) if fnmatch.fnmatchcase(part, pattern)]
            if parts and not matches(name, pattern):
                raise ValueError(
                    f"{field} pattern {pattern!r} matches {parts[0]} alone, which is one matmul with others here, in "
                    f"one format: {name}; give that name, or a pattern of all its parts {parts_of(name)}"
                )
        if not any(matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or [*names][:3]
            raise ValueError(f"{field} pattern {pattern!r} matches no layer; layers are {close} ...")


def check_choices(field: str, choices: Choices[FormatT], names: Collection[str], decided: Collection[str] = ()) -> None:
    """:func:`check_patterns`; raises ValueError as well for a pattern that decides nothing.

    Patterns after it decide first, and ``decided`` layers are so already.
    """
    check_patterns(field, [pattern for pattern, _ in choices], names)
    left = set(names) - set(decided)
    for pattern, _ in reversed(choices):
        meant = {name for name in left if matches(name, pattern)}
        if not meant:
            raise ValueError(f"{field} pattern {pattern!r} decides nothing: others decide all that it matches")
        left -= meant
