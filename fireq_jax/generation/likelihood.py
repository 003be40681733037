"""How likely a model finds tokens that are given."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from fireq_jax.compilation import cached_export
from fireq_jax.device_memory import check_fits
from fireq_jax.generation.request import round_up
from fireq_jax.models.inputs import as_array, check_shapes, check_values, right_pad
from fireq_jax.models.llama import CausalLM


def token_logprobs(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
) -> Float32[Array, "B T-1"]:
    """Log-probability (nats) of each token after the tokens before it.

    A row's sum is the log-likelihood of its text, given its first token. Programs are shared by lengths that
    ``generate`` rounds up to one.

    Args:
        model: float or quantized.
        input_ids: int [B, T].
        attention_mask: 1 for tokens, 0 for padding anywhere, [B, T]; None means no padding.

    Returns:
        float32 [B, T - 1]: column i is of token i + 1; 0 for padding, and for a row's first token.

    Raises:
        ValueError: for input that the model does not take, fewer than two tokens a row, or logits
            [B, T rounded up, V] that cannot fit into memory.
    """
    ids = as_array("input_ids", input_ids)
    mask = None if attention_mask is None else as_array("attention_mask", attention_mask)
    check_shapes(ids, mask)
    check_values(ids, mask, model.config.vocab_size)
    (batch, length), width = ids.shape, round_up(ids.shape[1])
    if length < 2:
        raise ValueError(f"input_ids has shape {ids.shape}; expected at least two tokens a row")
    arrays, structure = jax.tree.flatten(model)
    logits = batch * width * model.config.vocab_size * np.dtype(np.float32).itemsize
    check_fits(f"the logits of {batch} x {width} tokens", logits, arrays)
    mask = np.ones(ids.shape, np.int32) if mask is None else mask.astype(np.int32)
    # Ids under padding are free, and int32 may not hold them.
    given = (np.pad(rows.astype(np.int32), ((0, 0), (0, width - length))) for rows in (np.where(mask, ids, 0), mask))
    nll = jax.device_get(token_nll(structure, arrays, *map(jax.device_put, given)))
    return jax.device_put(-nll[:, : length - 1] + 0.0)  # no negative zeros


@functools.partial(jax.jit, static_argnames="structure")
@cached_export("structure")
def token_nll(
    structure: Any, arrays: list[Array], tokens: Int32[Array, "B T"], mask: Int32[Array, "B T"] | None
) -> Float32[Array, "B T-1"]:
    """Negative log-likelihood of each row's tokens 1, 2, ..., T - 1 by the model that was flattened.

    With a ``mask`` it is 0 for padding and each row's first token.
    """
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    order = None
    if mask is not None:
        tokens, lengths, order = right_pad(tokens, mask)
        mask = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    logits = model(tokens, mask)[:, :-1]
    nll = jax.nn.logsumexp(logits, axis=-1) - of_next(logits, tokens)
    if order is None or mask is None:
        return nll
    columns = jnp.where(mask[:, 1:] > 0, order[:, 1:] - 1, nll.shape[1])
    return jnp.zeros_like(nll).at[jnp.arange(len(nll))[:, None], columns].set(nll, mode="drop")


def of_next(values: Float32[Array, "B T-1 V"], tokens: Int32[Array, "B T"]) -> Float32[Array, "B T-1"]:
    """Each row's entries of its tokens 1, 2, ..., T - 1."""
    return jnp.take_along_axis(values, tokens[:, 1:, None], axis=-1)[..., 0]
