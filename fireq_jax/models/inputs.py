"""Token ids and attention masks as callers give them, checked where their values can be seen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def as_array(name: str, numbers: Any) -> np.ndarray:
    """Numbers as a numpy array of any shape and dtype; those of a device are fetched.

    Raises:
        ValueError: quoting ``name``, for rows of different lengths, or a mapping such as a tokenizer returns.
    """
    if isinstance(numbers, Mapping):
        raise ValueError(
            f"{name} is a {type(numbers).__name__} of {sorted(map(str, numbers))}; expected an array: "
            "pass a tokenizer's result as **result, or result['input_ids']"
        )
    if isinstance(numbers, jax.Array):
        numbers = jax.device_get(numbers)
    try:
        return np.asarray(numbers)
    except ValueError as error:  # numpy's does not say whose
        raise ValueError(
            f"{name} has rows of different lengths; pad them to one, with an attention_mask that is 0 there"
        ) from error


def check_shapes(input_ids: Any, mask: Any) -> None:
    """Raise ValueError unless ids are integers [B, T] of at least one token, and a mask has their shape."""
    if input_ids.size == 0:
        raise ValueError(f"input_ids has shape {input_ids.shape}; expected prompts of at least one token")
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids is {input_ids.dtype} {input_ids.shape}; expected integers [batch, tokens]")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}; expected that of input_ids, {input_ids.shape}")


def check_values(input_ids: Int[np.ndarray, "B T"], mask: np.ndarray | None, vocab_size: int) -> None:
    """Raise ValueError for a mask of other numbers than 0 and 1, and for ids outside the vocabulary where it is 1."""
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if mask is not None:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"attention_mask has values {np.unique(mask)[:8]}; expected 0 and 1")
        outside &= mask.astype(bool)
    if outside.any():
        raise ValueError(
            f"input_ids holds {np.unique(input_ids[outside])[:8]}; expected ids from 0 to {vocab_size - 1}"
        )


def on_device(
    input_ids: Any, attention_mask: Any, vocab_size: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
    """int32 ids and mask on their device, checked; under ``jax.jit`` only their shapes can be.

    Raises:
        ValueError: for what :func:`check_shapes` and :func:`check_values` refuse.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    given = {
        name: numbers if isinstance(numbers, jax.Array) else as_array(name, numbers)
        for name, numbers in given.items()
        if numbers is not None
    }
    ids, mask = given["input_ids"], given.get("attention_mask")
    check_shapes(ids, mask)
    if all(map(_visible, given.values())):
        here = np.asarray(jax.device_get(ids)), None if mask is None else np.asarray(jax.device_get(mask))
        check_values(*here, vocab_size)
    if mask is not None:
        mask = _int32(mask)
    # Ids under padding are free, and int32 may not hold them.
    return _int32(ids), mask


def right_pad(
    input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Int[Array, "B T"]]:
    """Move each row's tokens to its front.

    Returns:
        tokens [B, T], lengths [B], and ``order`` [B, T] with tokens = input_ids[order].
    """
    order = jnp.argsort(attention_mask == 0, axis=1, stable=True)
    lengths = jnp.sum(attention_mask > 0, axis=1).astype(jnp.int32)
    return jnp.take_along_axis(input_ids, order, axis=1), lengths, order


def _visible(numbers: np.ndarray | Array) -> bool:
    """Whether the values are here to be looked at: not traced, nor on other processes' devices."""
    if not isinstance(numbers, jax.Array):
        return True
    return not isinstance(numbers, Tracer) and numbers.is_fully_addressable


def _int32(numbers: np.ndarray | Array) -> Int[Array, "B T"]:
    if isinstance(numbers, jax.Array):
        return numbers.astype(jnp.int32)
    return jax.device_put(numbers.astype(np.int32))
