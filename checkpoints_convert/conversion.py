"""The conversion itself: stream blocks through calibration, smoothing and rounding into a folder.

While it runs, a work folder holds what a resumed run needs (:mod:`~checkpoints_convert.work_folder`);
the output is complete when ``fireq.json`` is there.
"""

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int
from tqdm.auto import tqdm

from checkpoints_convert.algorithms.reconstruction import check_sequences
from checkpoints_convert.algorithms.smoothing import leaving, smooth_with_keys
from checkpoints_convert.block_effects import smoothing_effect, weight_errors, weight_sizes
from checkpoints_convert.cache_format import fit_cache
from checkpoints_convert.calibrate import BlockStatistics, Calibrator
from checkpoints_convert.compensation import Compensator
from checkpoints_convert.held_out import HeldOut, Streams, check_amount, log_report, scored
from checkpoints_convert.report import cost_of, report_of
from checkpoints_convert.rotated_checkpoint import in_its_basis
from checkpoints_convert.stored_codes import fit_codes, read_block, report_codes
from checkpoints_convert.work_folder import REPORT, WorkFolder, save_array, save_arrays
from fireq_jax import json_files
from fireq_jax.checkpoints import folder
from fireq_jax.checkpoints.quantized import FORMAT_FILES
from fireq_jax.checkpoints.reader import CheckpointReader, open_checkpoint
from fireq_jax.checkpoints.tokenizer import TOKENIZER_FILES, companion_files
from fireq_jax.command_line import check_interrupted
from fireq_jax.config_fields import check_kinds, check_types
from fireq_jax.models.block import linear_names
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters, pack_codes
from fireq_jax.quantization.config import QuantizationConfig
from fireq_jax.whole_files import check_digests, digest, write_whole
from pallas_kernels import formats
from pallas_kernels.quantized_tensor import QuantizedTensor

logger = logging.getLogger(__name__)


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
    """

    model: Path
    output: Path
    recipe: str
    quantization: QuantizationConfig
    dtype: str = "bfloat16"
    batch_size: int = 8
    fit_cache: bool = False
    keep_codes: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_kinds(self)
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; expected 'bfloat16' or 'float32'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected a positive number of sequences")


def needs_calibration(quantization: QuantizationConfig) -> bool:
    """Whether a config measures anything on text."""
    smoothing = quantization.smoothing
    return quantization.reads_text or (smoothing is not None and smoothing.measures_text)


def convert(
    options: ConversionOptions,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a checkpoint; returns the report that is also written to ``report.json``.

    Args:
        options: what and how.
        tokens: calibration tokens; None if the config needs none.
        held_out: other tokens of the same text. On them the log and the report's ``held_out`` say the perplexity of
            the float model, of the quantized one, and of rounding to nearest; there is a warning if the recipe is
            worse than that, or if there are no tokens ([0, T]). None measures nothing.
        resume: go on where an interrupted run of the same options stopped; a complete model of the same
            options is verified and left as it is.
        progress: show progress bars.

    Raises:
        ValueError: for anything wrong with the checkpoint, the options or the output folder; nothing has been
            written then. Also for a block that calibration text or rounding turns into NaN or infinity: the blocks
            before it stay.
        OSError, KeyboardInterrupt: naming what cannot be read or written, or for Ctrl-C; resume to go on.
    """
    started = time.perf_counter()
    original = open_checkpoint(options.model)
    quantization, kept = fit_codes(original, options.quantization, keep=options.keep_codes)
    source, quantization = in_its_basis(original, quantization, kept)
    config, options = source.config, dataclasses.replace(options, quantization=quantization)
    quantization.check_fits(linear_names(config), config.head_dim)
    _check_text(options, config, tokens, held_out)
    tokens, unseen = (tokens, scored(held_out)) if needs_calibration(quantization) else (None, None)
    work, fingerprint = WorkFolder(options.output), _fingerprint(options, source, tokens, unseen)
    if work.check(fingerprint, resume=resume):
        check_digests(options.output, folder.read_manifest(options.output).digests or {}, folder.UNVERIFIED)
        work.remove()
        logger.info("%s is complete", options.output)
        return json_files.read_json(options.output / REPORT)
    logger.info("%s", cost_of(source, quantization, tokens, unseen))
    if tokens is not None:
        check_amount(config, quantization, tokens)
        if held_out is not None and unseen is None:
            logger.warning("the calibration text has no window left to hold out: nothing says what other text loses")
    source.check_finite(progress=progress)

    with work.begun(fingerprint, resume=resume):
        first = work.finished_blocks(config.num_layers)
        options = _with_fitted_cache(source, options, tokens, kept, work)
        quantization = options.quantization
        rest = None if unseen is None else HeldOut(original, quantization, options.dtype, options.batch_size, unseen)
        if first < 0:
            _convert_globals(source, options, tokens, rest, work)
        first = max(first, 0)
        calibrator = Calibrator(config, options.batch_size) if tokens is not None else None
        _convert_blocks(source, options, first, kept, calibrator, rest, work, progress=progress)
        report = _finish(source, options, fingerprint, rest, work, time.perf_counter() - started, first)
    work.remove()
    return report


def _with_fitted_cache(
    source: CheckpointReader,
    options: ConversionOptions,
    tokens: Int[np.ndarray, "samples T"] | None,
    kept: frozenset[str],
    work: WorkFolder,
) -> ConversionOptions:
    """The options with the cache format that text asks for, once for all runs of a conversion."""
    if not options.fit_cache or options.quantization.layer_kv_formats:
        return options
    if not work.fitted_cache.is_file():
        kv_format, divergence = fit_cache(source, options.quantization, tokens, options.batch_size, kept)
        json_files.write_json(work.fitted_cache, {"kv_format": kv_format, "divergence": divergence})
    kv_format = json_files.read_json(work.fitted_cache)["kv_format"]
    if kv_format == options.quantization.kv_format:
        return options
    return dataclasses.replace(options, quantization=options.quantization.with_kv_format(kv_format))


def _convert_globals(
    source: CheckpointReader,
    options: ConversionOptions,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: HeldOut | None,
    work: WorkFolder,
) -> None:
    names = source.global_names()
    if options.quantization.lm_head_format != "none" and "lm_head" not in names:
        names = [*names, "lm_head"]
    digests, nbytes = {}, 0
    for name in names:
        tied = name == "lm_head" and source.config.tie_word_embeddings
        array = source.global_tensor("embed_tokens" if tied else name)
        if name == "embed_tokens" and tokens is not None:
            save_array(work.hidden(0), array[tokens].astype(np.float32) * np.float32(source.config.embedding_scale))
            if held_out is not None:
                save_array(work.held_out(0), np.stack(held_out.start(array)))
        parameters = global_parameters({name: array}, options.quantization, options.dtype)
        part = folder.part_of(name)
        digests[f"params/{part}"] = folder.save_part(options.output, part, parameters)
        nbytes += formats.nbytes(parameters)
    work.finish(-1, digests, {"bytes": nbytes})


def _convert_blocks(
    source: CheckpointReader,
    options: ConversionOptions,
    first: int,
    kept: frozenset[str],
    calibrator: Calibrator | None,
    held_out: HeldOut | None,
    work: WorkFolder,
    *,
    progress: bool,
) -> None:
    """All blocks from ``first`` on; linear layers ``kept`` keep their codes."""
    config, quantization = source.config, options.quantization
    compensator = Compensator(config, quantization, options.batch_size) if quantization.reads_text else None
    for index in tqdm(
        range(first, config.num_layers),
        initial=first,
        total=config.num_layers,
        desc="converting",
        unit="block",
        disable=not progress,
    ):
        check_interrupted()
        _convert_block(source, options, index, kept, calibrator, compensator, held_out, work)


def _convert_block(
    source: CheckpointReader,
    options: ConversionOptions,
    index: int,
    kept: frozenset[str],
    calibrator: Calibrator | None,
    compensator: Compensator | None,
    held_out: HeldOut | None,
    work: WorkFolder,
) -> None:
    started = time.perf_counter()
    config, quantization = source.config, options.quantization
    block, codes = read_block(source, index, kept)
    statistics: BlockStatistics | None = None
    if calibrator is not None:
        hidden = np.load(work.hidden(index), mmap_mode="r")
        output, statistics = calibrator.run(block, index, hidden)
        if not np.isfinite(output).all():
            raise ValueError(f"block {index} turns calibration text into NaN or infinity; the checkpoint is broken")
        if index + 1 < config.num_layers:
            save_array(work.hidden(index + 1), output)
        del output, hidden
    unseen = None
    if held_out is not None:
        plain = held_out.original_block(index) if quantization.rotates else block
        unseen = held_out.run_float(index, plain, Streams(*np.load(work.held_out(index))))
    smoothing = quantization.smoothing
    if smoothing is not None:
        smoothing = leaving(smoothing, [name.removeprefix(f"layers.{index}.") for name in kept], config)
        keys = inputs = values = None
        if statistics is not None:
            keys, values = statistics.keys, statistics.values
            inputs = {name: channels.mean_abs for name, channels in statistics.inputs.items()}
        smoothed, transform = smooth_with_keys(block, keys, config, smoothing, inputs, values)
        save_arrays(work.smoothing(index), smoothing_effect(block, smoothed, keys, transform))
        block = smoothed
        del smoothed
    if compensator is None:
        parameters = layer_parameters({**block, **codes}, index, quantization, options.dtype)
    else:
        packed = pack_codes(codes, quantization)
        parameters = _compensate_block(compensator, block, packed, index, options.dtype, work)
    if held_out is not None and unseen is not None:
        unseen = held_out.run_quantized(index, parameters, unseen)
        save_array(work.held_out(index + 1), np.stack(unseen))
    errors = weight_errors(block, index, parameters)
    if broken := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise ValueError(f"block {index}: {broken[0]} became NaN or infinite when it was smoothed or quantized")
    report = {
        "weight_error": errors,
        "weights": weight_sizes(index, parameters),
        **({"codes": report_codes(errors, index, kept, codes)} if source.quantized else {}),
        "bytes": formats.nbytes(parameters),
        "seconds": round(time.perf_counter() - started, 3),
    }
    sha256 = folder.save_part(options.output, f"layers.{index}", parameters)
    work.finish(index, {f"params/layers.{index}": sha256}, report)


def _compensate_block(
    compensator: Compensator,
    block: Mapping[str, Array],
    kept: Mapping[str, QuantizedTensor],
    index: int,
    dtype: str,
    work: WorkFolder,
) -> dict[str, Parameter]:
    hidden = np.load(work.hidden(index), mmap_mode="r")
    quantized_hidden = hidden
    if compensator.follows_quantized and index > 0:
        quantized_hidden = np.load(work.quantized_hidden(index), mmap_mode="r")
    parameters, output = compensator.quantize(block, index, hidden, quantized_hidden, dtype, kept)
    if output is not None:
        save_array(work.quantized_hidden(index + 1), output)
    return parameters


def _finish(
    source: CheckpointReader,
    options: ConversionOptions,
    fingerprint: Mapping[str, Any],
    held_out: HeldOut | None,
    work: WorkFolder,
    seconds: float,
    first: int,
) -> dict[str, Any]:
    """The report; this run took ``seconds`` and began with block ``first``."""
    config, output = source.config, options.output
    records = [record for index in range(-1, config.num_layers) if (record := work.record(index)) is not None]
    seconds += sum(record["report"]["seconds"] for record in records[1 : first + 1])
    report = report_of(options.model, options.recipe, options.quantization, source, fingerprint, records, work, seconds)
    if held_out is not None:
        report["held_out"] = held_out.report(source, Streams(*np.load(work.held_out(config.num_layers))))
        log_report(report["held_out"], options.recipe)
    effects = {
        f"layers.{i}.{name}": array
        for i in range(config.num_layers)
        if (path := work.smoothing(i)).is_file()
        for name, array in np.load(path).items()
    }
    if effects:
        save_arrays(output / "smoothing.npz", effects)
    written = {name: sha256 for record in records for name, sha256 in record["sha256"].items()}
    parts = {name: sha256 for name, sha256 in written.items() if name.startswith("params/")}
    folder.remove_other_parts(output, [name.removeprefix("params/") for name in parts])
    with companion_files(options.model) as companions:
        copies = {name: _copy(path, output / name) for name, path in companions.items()}
    tokenizer = {name: sha256 for name, sha256 in copies.items() if name in TOKENIZER_FILES}
    json_files.write_json(output / REPORT, report)
    folder.write_manifest(output, config, options.quantization, parts | tokenizer)
    return report


def _copy(source: Path, target: Path) -> str:
    """Copy a file, whole or not at all; returns its digest."""
    with source.open("rb") as file:
        write_whole(target, lambda copy: shutil.copyfileobj(file, copy))
    return digest(target)


def _check_text(
    options: ConversionOptions,
    config: ModelConfig,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None,
) -> None:
    """Raise ValueError unless the text is what the recipe and the model take."""
    quantization = options.quantization
    if tokens is None and needs_calibration(quantization):
        raise ValueError(f"recipe {options.recipe!r} measures keys on text; give calibration text")
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


def _fingerprint(
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
