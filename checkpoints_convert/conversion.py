"""The conversion itself: stream blocks through calibration, smoothing and rounding into a folder.

While it runs, a work folder holds what a resumed run needs (:mod:`~checkpoints_convert.work_folder`);
the output is complete when ``fireq.json`` is there.
"""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int
from tqdm.auto import tqdm

from checkpoints_convert.algorithms.smoothing import leaving, smooth_with_keys
from checkpoints_convert.block_effects import smoothing_effect, weight_errors, weight_sizes
from checkpoints_convert.cache_format import fit_cache
from checkpoints_convert.calibrate import BlockStatistics, Calibrator
from checkpoints_convert.calibration_data import check_text, needs_calibration
from checkpoints_convert.compensation import Compensator
from checkpoints_convert.conversion_options import ConversionOptions, Opened, fingerprint_of
from checkpoints_convert.held_out import HeldOut, Streams, check_amount, log_report, scored
from checkpoints_convert.model_card import write_card
from checkpoints_convert.report import report_of
from checkpoints_convert.stored_codes import read_block, report_codes
from checkpoints_convert.work_folder import REPORT, WorkFolder, save_array, save_arrays
from fireq_jax import json_files
from fireq_jax.checkpoints import folder
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.checkpoints.tokenizer import TOKENIZER_FILES, companion_files
from fireq_jax.command_line import check_interrupted
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters, pack_codes
from fireq_jax.whole_files import check_digests, digest, write_whole
from pallas_kernels import formats
from pallas_kernels.quantized_tensor import QuantizedTensor

logger = logging.getLogger(__name__)


def dry_run(options: ConversionOptions, text: tuple[int, int] | None, held_out: int = 0) -> list[str]:
    """What :func:`convert` is going to do, a line each; writes nothing.

    Args:
        options: what and how.
        text: how many calibration windows there will be, and tokens of each; None for none.
        held_out: windows that are held out.

    Raises:
        ValueError: as :func:`convert`, for the checkpoint and the options.
    """
    return Opened.of(options).plan(text, held_out)


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
    opened = Opened.of(options)
    original, source, options, kept = opened
    config, quantization = source.config, options.quantization
    check_text(options.recipe, config, quantization, tokens, held_out)
    tokens, unseen = (tokens, scored(held_out)) if needs_calibration(quantization) else (None, None)
    work, fingerprint = WorkFolder(options.output), fingerprint_of(options, source, tokens, unseen)
    if work.check(fingerprint, resume=resume):
        check_digests(options.output, folder.read_manifest(options.output).digests or {}, folder.UNVERIFIED)
        work.remove()
        logger.info("%s is complete", options.output)
        return json_files.read_json(options.output / REPORT)
    sizes = None if tokens is None else (tokens.shape[0], tokens.shape[1])
    logger.info("%s", "\n".join(opened.plan(sizes, 0 if unseen is None else len(unseen))))
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
    write_card(output, options.base_model, options.model, config, report)
    folder.write_manifest(output, config, options.quantization, parts | tokenizer)
    return report


def _copy(source: Path, target: Path) -> str:
    """Copy a file, whole or not at all; returns its digest."""
    with source.open("rb") as file:
        write_whole(target, lambda copy: shutil.copyfileobj(file, copy))
    return digest(target)
