"""What kinds of operands an op is given, checked before anything is asked of them."""

from typing import Any, get_args

from jaxtyping import Array

from pallas_kernels.formats import ScaledArray


def check_operands(kind: Any, **operands: Any) -> None:
    """Raise ValueError naming the first operand of another kind.

    Args:
        kind: a class, or a union of some. ``jax.Array`` is whatever has a shape and a dtype; a ``ScaledArray``
            holds such.
        operands: by the names of the op's arguments.
    """
    kinds = get_args(kind) or (kind,)
    for name, operand in operands.items():
        if not any(_is_array(operand) if option is Array else isinstance(operand, option) for option in kinds):
            names = {Array: "an array", type(None): "None"}
            expected = " or ".join(names.get(option, f"a {option.__name__}") for option in kinds)
            raise ValueError(f"{name} is {_describe(operand)}; expected {expected}")
        if isinstance(operand, ScaledArray):
            check_operands(Array, **{f"{name}.values": operand.values})
            check_operands(Array | None, **{f"{name}.scale": operand.scale})


def _is_array(operand: Any) -> bool:
    return hasattr(operand, "shape") and hasattr(operand, "dtype")


def _describe(operand: Any) -> str:
    if _is_array(operand):
        return f"an array {operand.dtype}{list(operand.shape)}"
    return "None" if operand is None else f"of type {type(operand).__name__}"
