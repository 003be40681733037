"""What to convert, and how: the options, the checkpoint that they name, and what a continuation has to share."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int

from checkpoints_convert.calibration_data import needs_calibration
from checkpoints_convert.plan import Work, plan_of
from checkpoints_convert.rotated_checkpoint import in_its_basis
from checkpoints_convert.stored_codes import fit_codes
from fireq_jax.checkpoints.quantized import FORMAT_FILES
from fireq_jax.checkpoints.reader import CheckpointReader, open_checkpoint
from fireq_jax.checkpoints.tokenizer import companion_files
from fireq_jax.config_fields import check_kinds, check_types
from fireq_jax.models.block import linear_names
from fireq_jax.quantization.config import QuantizationConfig
from fireq_jax.whole_files import digest


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """What to convert, and how.

    Attributes:
        model: Hugging Face folder, or GGUF file.
        output: folder to write; must not hold anything else.
        recipe: name of the recipe, for the report.
        quantization: the recipe's config, with overrides applied.
        dtype: of embeddings, head and unquantized weights in the output.
        batch_size: calibration sequences a step.
        fit_cache: in a model with biases in attention, take a larger cache format if calibration text asks for it
            (:mod:`~checkpoints_convert.cache_format`). Not where ``layer_kv_formats`` says what layers have.
        keep_codes: of a quantized checkpoint keep the codes of the linear layers whose codes fit the recipe; else all
            are made of what its codes stand for.
        base_model: hub id of the model, for the output's card; None where it is not from there.
    """

    model: Path
    output: Path
    recipe: str
    quantization: QuantizationConfig
    dtype: str = "bfloat16"
    batch_size: int = 8
    fit_cache: bool = False
    keep_codes: bool = True
    base_model: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_kinds(self)
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; expected 'bfloat16' or 'float32'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected a positive number of sequences")


class Opened(NamedTuple):
    """A checkpoint as it is converted, and how.

    Attributes:
        original: the checkpoint.
        source: the same in the basis that it is converted in.
        options: with the quantization as it is applied.
        kept: linear layers that keep their codes.
    """

    original: CheckpointReader
    source: CheckpointReader
    options: ConversionOptions
    kept: frozenset[str]

    @classmethod
    def of(cls, options: ConversionOptions) -> Self:
        """Open the checkpoint; ValueError if it cannot be converted so."""
        original = open_checkpoint(options.model)
        quantization, kept = fit_codes(original, options.quantization, keep=options.keep_codes)
        source, quantization = in_its_basis(original, quantization, kept)
        quantization.check_fits(linear_names(source.config), source.config.head_dim)
        return cls(original, source, dataclasses.replace(options, quantization=quantization), kept)

    def plan(self, text: tuple[int, int] | None, held_out: int) -> list[str]:
        """``plan_of`` it, for so much text."""
        source, options = self.source, self.options
        text = text if needs_calibration(options.quantization) else None
        return plan_of(
            Work(
                source.config,
                options.quantization,
                options.output,
                options.dtype,
                options.batch_size,
                source.nbytes,
                text,
                0 if text is None else held_out,
                self.kept,
            )
        )


def fingerprint_of(
    options: ConversionOptions,
    source: CheckpointReader,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None,
) -> dict[str, Any]:
    """What must not change between an interrupted run and its continuation."""
    home = options.model if options.model.is_dir() else options.model.parent
    with companion_files(options.model) as companions:
        digests = {f"{name}, SHA-256": digest(path) for name, path in companions.items()}
    return {
        "model": str(options.model.resolve()),
        **{f"the model's {name}": value for name, value in source.config.to_dict().items()},
        **{
            f"{os.path.relpath(path, home)}, size and time": [path.stat().st_size, path.stat().st_mtime_ns]
            for path in source.files
        },
        **digests,
        **{
            f"{name}, SHA-256": digest(path)
            for name in (FORMAT_FILES if source.quantized else ())
            if (path := options.model / name).is_file()
        },
        "quantization": options.quantization.to_dict(),
        "fit_cache": options.fit_cache and source.config.attention_bias,
        "dtype": options.dtype,
        "keep_codes": options.keep_codes,
        **{
            name: None if text is None else [*text.shape, hashlib.sha256(text.tobytes()).hexdigest()]
            for name, text in (("calibration", tokens), ("held_out", held_out))
        },
    }
