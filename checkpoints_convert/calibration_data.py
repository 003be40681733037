"""Calibration text -> batches of token ids, the same on every machine for the same seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from checkpoints_convert.algorithms.reconstruction import check_sequences
from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from fireq_jax.text_data import Document, read_documents, tokenize

# Held-out windows: an eighth of the calibration windows, or more where that is fewer than this many tokens.
HELD_OUT_TOKENS = 2048
MOST_HELD_OUT = 16  # windows

Windows = Int32[np.ndarray, "samples sequence_length"]


def calibration_batches(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    text_field: str = "text",
) -> Windows:
    """Random windows of a text's token stream, int32 [samples, sequence_length].

    Args:
        source: file, folder or data set (see :mod:`fireq_jax.text_data`).
        tokenizer: the model's transformers tokenizer.
        samples: number of windows.
        sequence_length: tokens of each window.
        seed: chooses the windows; 0 or more.
        text_field: where .jsonl, .parquet and data sets hold their text.

    Raises:
        ValueError: if the source cannot be read or has too few tokens.
    """
    return calibration_and_held_out(
        source, tokenizer, samples=samples, sequence_length=sequence_length, seed=seed, text_field=text_field
    )[0]


def calibration_and_held_out(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    text_field: str = "text",
) -> tuple[Windows, Windows]:
    """What :func:`calibration_batches` returns, and :func:`held_out_windows` of the same text.

    Arguments and errors are those of :func:`calibration_batches`.
    """
    check_sizes(samples=samples, sequence_length=sequence_length, seed=seed)
    documents = read_documents(source, text_field=text_field)
    return calibration_windows(
        documents, tokenizer, source=source, samples=samples, sequence_length=sequence_length, seed=seed
    )


def calibration_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    source: str | Path,
    samples: int,
    sequence_length: int,
    seed: int = 0,
) -> tuple[Windows, Windows]:
    """:func:`calibration_batches` of texts that are read already, and :func:`held_out_windows` of the same text.

    ``source`` is where the texts came from.

    Raises:
        ValueError: naming ``source``, if there are too few tokens.
    """
    tokens = tokenize(documents, tokenizer)
    sizes = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    try:
        return sample_windows(tokens, **sizes), held_out_windows(tokens, **sizes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_sizes(*, samples: int, sequence_length: int, seed: int) -> None:
    """Raise ValueError unless the sizes are positive and the seed is not negative."""
    for name, value, least in (("samples", samples, 1), ("sequence_length", sequence_length, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")


def sample_windows(tokens: Int32[np.ndarray, " tokens"], *, samples: int, sequence_length: int, seed: int) -> Windows:
    """Different windows out of the consecutive, non-overlapping ones that ``tokens`` is cut into.

    Raises:
        ValueError: if a size is not positive or there are fewer than ``samples`` windows.
    """
    windows, order = _shuffled(tokens, samples, sequence_length, seed)
    return windows[order[:samples]]


def held_out_windows(tokens: Int32[np.ndarray, " tokens"], *, samples: int, sequence_length: int, seed: int) -> Windows:
    """Windows that :func:`sample_windows` leaves, to measure on what calibration did not see.

    Arguments and errors are those of :func:`sample_windows`.

    Returns:
        As many as ``samples`` / 8 or ``HELD_OUT_TOKENS`` tokens need, at most ``MOST_HELD_OUT``; fewer, or none
        ([0, sequence_length]), where the text has no more.
    """
    windows, order = _shuffled(tokens, samples, sequence_length, seed)
    return windows[order[samples : samples + most_held_out(samples, sequence_length)]]


def most_held_out(samples: int, sequence_length: int) -> int:
    """How many windows are held out of a text that has enough."""
    return min(MOST_HELD_OUT, max(samples // 8, -(-HELD_OUT_TOKENS // sequence_length)))


def _shuffled(
    tokens: Int32[np.ndarray, " tokens"], samples: int, sequence_length: int, seed: int
) -> tuple[Windows, Int[np.ndarray, " windows"]]:
    """All windows of the text, and the order in which they are taken."""
    check_sizes(samples=samples, sequence_length=sequence_length, seed=seed)
    windows = len(tokens) // sequence_length
    if windows < samples:
        raise ValueError(
            f"the text has {len(tokens)} tokens; {samples} samples of {sequence_length} tokens need "
            f"{samples * sequence_length}: give more text, or ask for fewer or shorter samples"
        )
    # numpy promises that the raw bits of a bit generator never change, which it does not promise
    # of Generator's methods; ordering the windows by them is a random permutation.
    order = np.argsort(np.random.PCG64(seed).random_raw(windows), kind="stable")
    return tokens[: windows * sequence_length].reshape(windows, sequence_length), order


def needs_calibration(quantization: QuantizationConfig) -> bool:
    """Whether a config measures anything on text."""
    smoothing = quantization.smoothing
    return quantization.reads_text or (smoothing is not None and smoothing.measures_text)


def check_text(
    recipe: str,
    config: ModelConfig,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None,
) -> None:
    """Raise ValueError unless the text is what the ``recipe`` of that name and the model take."""
    if tokens is None and needs_calibration(quantization):
        raise ValueError(f"recipe {recipe!r} measures keys on text; give calibration text")
    for name, text in (("calibration", tokens), ("held-out", held_out)):
        if text is not None:
            _check_tokens(name, text, config)
    if tokens is not None and not tokens.size:
        raise ValueError(f"calibration tokens have shape {tokens.shape}; expected one sample or more")
    if tokens is not None and quantization.learned_steps:
        check_sequences(len(tokens))


def _check_tokens(name: str, tokens: Int[np.ndarray, "samples T"], config: ModelConfig) -> None:
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        kind = f"{tokens.dtype}{list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ValueError(f"{name} tokens are {kind}; expected an array of integers [samples, length]")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise ValueError(
            f"{name} tokens reach from {tokens.min()} to {tokens.max()}; the model's vocabulary has "
            f"{config.vocab_size} entries"
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{name} sequences have {tokens.shape[1]} tokens; the model's positions end at "
            f"{config.max_position_embeddings}"
        )
