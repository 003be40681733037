"""Codebooks: what the codes of a 4-bit weight stand for."""

import itertools
import math
from collections.abc import Iterable, Sequence
from types import MappingProxyType

import jax
import numpy as np

# "int4", "fp4", "nf4", or a name that was registered.
Codebook = str

_BUILT_IN: dict[str, tuple[float, ...]] = {
    "int4": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "nf4": (0.0, 0.640625, 1.296875, 1.984375, 2.75, 3.6875, 4.875, 7.0),
}
_OTHER_FORMATS = "fp8", "none"  # of weights
_BITS = 7  # significant ones of a magnitude
_LEAST, _MOST = 2.0**-9, 448.0
_codebooks = dict(_BUILT_IN)
# What codes 0..7 of a weight stand for, in units of its group's scale.
CODEBOOKS = MappingProxyType(_codebooks)


def own_codebooks(names: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The registered ones among ``names``, which may name anything."""
    return {name: _codebooks[name] for name in names if name in _codebooks and name not in _BUILT_IN}


def register_codebook(name: str, magnitudes: Sequence[float] | np.ndarray | jax.Array) -> None:
    """Add a codebook, which is then a weight format of this process; again with the same numbers does nothing.

    A code is a sign and three bits: the kernels choose one of eight bytes by these, and write the sign into it. So
    fifteen values are given by eight magnitudes, of which the first is 0: what weights are padded with. The bytes are
    E4M3, rounded from products of the magnitudes and a group's E4M3 scale in float16; these are exact, and are rounded
    once, if a magnitude has no more than seven significant bits and none but 0 is below 2^-9.

    Args:
        name: what ``QuantizationConfig.weight_format`` calls it.
        magnitudes: of codes 0..7, rising, from 0 to a largest of 1 to 448. With bf16 scales the kernels take only
            numbers of E4M3, and plain XLA others.

    Raises:
        ValueError: for other numbers, or a name that means something else.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in (*_OTHER_FORMATS, *_BUILT_IN):
        taken = (*_BUILT_IN, *_OTHER_FORMATS)
        raise ValueError(f"codebook is called {name!r}; expected an identifier other than {taken}")
    if isinstance(magnitudes, np.ndarray | jax.Array):
        magnitudes = magnitudes.tolist()
    if not isinstance(magnitudes, Sequence) or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in magnitudes
    ):
        raise ValueError(f"codebook {name!r} is {magnitudes!r}; expected eight numbers")
    values = tuple(float(number) for number in magnitudes)
    if len(values) != 8 or values[0] != 0 or not all(a < b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"codebook {name!r} is {values}; expected eight rising magnitudes from 0: a code is a sign and three bits"
        )
    for value in values[1:]:
        if not _LEAST <= value <= _MOST or not (math.frexp(value)[0] * 2**_BITS).is_integer():
            raise ValueError(
                f"codebook {name!r} has {value}; expected {_LEAST} to {_MOST:g} with {_BITS} significant bits, as in "
                f"{_nearest(value)}: its product with an E4M3 scale has to be exact in float16"
            )
    if values[-1] < 1:
        raise ValueError(f"codebook {name!r} ends with {values[-1]}; expected 1 to {_MOST:g}, for E4M3 scales to fit")
    if _codebooks.setdefault(name, values) != values:
        raise ValueError(f"codebook {name!r} is {values}, and is registered as {_codebooks[name]}; give another name")


def _nearest(value: float) -> float:
    """The nearest number of so many significant bits in range."""
    mantissa, exponent = math.frexp(min(max(value, _LEAST), _MOST))
    return math.ldexp(round(mantissa * 2**_BITS), exponent - _BITS)
