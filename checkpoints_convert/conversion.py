"""The conversion itself: stream blocks through calibration, smoothing and rounding into a folder.

While it runs, ``OUTPUT/.conversion`` holds what a resumed run needs: the options, the hidden
states that enter the next block, and each finished block's part of the report. A block counts as
done when its Orbax checkpoint is committed; the folder is complete when ``fireq.json`` is there.
"""

import dataclasses
import hashlib
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from checkpoints_convert.algorithms.keys import KeyStatistics, KeyTransform
from checkpoints_convert.algorithms.reconstruction import check_sequences
from checkpoints_convert.algorithms.smoothing import applicable, smooth_with_keys
from checkpoints_convert.calibrate import BlockStatistics, Calibrator
from checkpoints_convert.compensation import Compensator, compensation_operations
from fireq_jax import json_files
from fireq_jax.checkpoints import folder
from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from fireq_jax.models.block import block_shapes, fuse_block, linear_names
from fireq_jax.models.llama import CausalLM
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.quantized_tensor import QuantizedTensor

# Everything a tokenizer or a chat template may consist of, and generation defaults.
COMPANION_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """What to convert, and how.

    Attributes:
        model: Hugging Face folder.
        output: folder to write; must not hold anything else.
        recipe: name of the recipe, for the report.
        quantization: the recipe's config, with overrides applied.
        dtype: of embeddings, head and unquantized weights in the output.
        batch_size: calibration sequences a step.
    """

    model: Path
    output: Path
    recipe: str
    quantization: QuantizationConfig
    dtype: str = "bfloat16"
    batch_size: int = 8

    def __post_init__(self) -> None:
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
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a checkpoint; returns the report that is also written to ``report.json``.

    Args:
        options: what and how.
        tokens: calibration tokens; None if the config needs none.
        resume: go on where an interrupted run of the same options stopped.
        progress: show progress bars.

    Raises:
        ValueError: for anything wrong with the checkpoint, the options or the output folder;
            nothing has been written then.
    """
    started = time.perf_counter()
    source = HuggingFaceCheckpoint(options.model)
    config, quantization = source.config, options.quantization
    if quantization.smoothing is not None:
        smoothing = applicable(quantization.smoothing, config)
        if left_out := [name for name, value in vars(smoothing).items() if value != vars(quantization.smoothing)[name]]:
            logger.info("%s would change what a %s computes: left out", " and ".join(left_out), config.model_type)
        quantization = dataclasses.replace(quantization, smoothing=smoothing)
        options = dataclasses.replace(options, quantization=quantization)
    quantization.check_fits(linear_names(config), config.head_dim)
    if tokens is None and needs_calibration(quantization):
        raise ValueError(f"recipe {options.recipe!r} measures keys on text; give calibration text")
    if tokens is not None:
        _check_tokens(tokens, config.vocab_size, config.max_position_embeddings)
        if quantization.learned_steps:
            check_sequences(len(tokens))
    tokens = tokens if needs_calibration(quantization) else None
    fingerprint = _fingerprint(options, source, tokens)
    _check_output(options.output, fingerprint, resume=resume)
    logger.info("%s", _cost(source, quantization, tokens))
    source.check_finite(progress=progress)

    work = options.output / folder.WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    json_files.write_json(work / "options.json", fingerprint)
    _convert_globals(source, options, tokens, work)
    calibrator = Calibrator(config, options.batch_size)
    compensator = Compensator(config, quantization, options.batch_size) if quantization.reads_text else None
    first = _blocks_done(options.output, config.num_layers)
    for index in tqdm(
        range(first, config.num_layers),
        initial=first,
        total=config.num_layers,
        desc="converting",
        unit="block",
        disable=not progress,
    ):
        _convert_block(source, options, index, calibrator if tokens is not None else None, compensator, work)
    return _finish(source, options, tokens, work, time.perf_counter() - started, first)


def _convert_globals(
    source: HuggingFaceCheckpoint, options: ConversionOptions, tokens: Int[np.ndarray, "samples T"] | None, work: Path
) -> None:
    names = source.global_names()
    if options.quantization.lm_head_format != "none" and "lm_head" not in names:
        names = [*names, "lm_head"]
    for name in names:
        hidden = _hidden_path(work, 0)
        starts = name == "embed_tokens" and tokens is not None and _blocks_done(options.output, 1) == 0
        if not starts and folder.part_path(options.output, folder.part_of(name)).is_dir():
            continue
        tied = name == "lm_head" and source.config.tie_word_embeddings
        array = source.global_tensor("embed_tokens" if tied else name)
        if starts:
            _save_array(hidden, array[tokens].astype(np.float32) * np.float32(source.config.embedding_scale))
        parameters = global_parameters({name: array}, options.quantization, options.dtype)
        folder.save_part(options.output, folder.part_of(name), parameters)


def _convert_block(
    source: HuggingFaceCheckpoint,
    options: ConversionOptions,
    index: int,
    calibrator: Calibrator | None,
    compensator: Compensator | None,
    work: Path,
) -> None:
    started = time.perf_counter()
    config, quantization = source.config, options.quantization
    block = {name: jnp.asarray(array).astype(jnp.float32) for name, array in source.block(index).items()}
    statistics: BlockStatistics | None = None
    if calibrator is not None:
        hidden = np.load(_hidden_path(work, index), mmap_mode="r")
        output, statistics = calibrator.run(block, index, hidden)
        if not np.isfinite(output).all():
            raise ValueError(f"block {index} turns calibration text into NaN or infinity; the checkpoint is broken")
        if index + 1 < config.num_layers:
            _save_array(_hidden_path(work, index + 1), output)
        del output, hidden
    if quantization.smoothing is not None:
        keys = inputs = values = None
        if statistics is not None:
            keys, values = statistics.keys, statistics.values
            inputs = {name: channels.mean_abs for name, channels in statistics.inputs.items()}
        smoothed, transform = smooth_with_keys(block, keys, config, quantization.smoothing, inputs, values)
        _save_arrays(work / f"smoothing.{index}.npz", smoothing_effect(block, smoothed, keys, transform))
        block = smoothed
        del smoothed
    if compensator is None:
        parameters = layer_parameters(block, index, quantization, options.dtype)
    else:
        parameters = _compensate_block(compensator, block, index, options.dtype, work)
    errors = _weight_errors(block, index, parameters)
    if broken := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise ValueError(f"block {index}: {broken[0]} became NaN or infinite when it was smoothed or quantized")
    report = {
        "weight_error": errors,
        "bytes": formats.nbytes(parameters),
        "seconds": round(time.perf_counter() - started, 3),
    }
    json_files.write_json(work / f"block.{index}.json", report)
    folder.save_part(options.output, f"layers.{index}", parameters)
    for path in (_hidden_path(work, index), _quantized_hidden_path(work, index)):
        path.unlink(missing_ok=True)


def _compensate_block(
    compensator: Compensator, block: Mapping[str, Array], index: int, dtype: str, work: Path
) -> dict[str, Parameter]:
    hidden = np.load(_hidden_path(work, index), mmap_mode="r")
    quantized_hidden = hidden
    if compensator.follows_quantized and index > 0:
        quantized_hidden = np.load(_quantized_hidden_path(work, index), mmap_mode="r")
    parameters, output = compensator.quantize(block, index, hidden, quantized_hidden, dtype)
    if output is not None:
        _save_array(_quantized_hidden_path(work, index + 1), output)
    return parameters


def _weight_errors(block: Mapping[str, Array], index: int, parameters: Mapping[str, Parameter]) -> dict[str, float]:
    """Relative Frobenius error of each quantized linear layer."""
    fused = fuse_block(block)
    return {
        name: round(float(_relative_error(parameters[full], fused[f"{name}.weight"])), 6)
        for name in sorted(linear.removesuffix(".weight") for linear in fused if linear.endswith("proj.weight"))
        if isinstance(parameters[full := f"layers.{index}.{name}.weight"], QuantizedTensor)
    }


def smoothing_effect(
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    keys: KeyStatistics | None,
    transform: KeyTransform | None,
) -> dict[str, np.ndarray]:
    """Channel absmax before and after smoothing, for plots.

    Returns:
        ``<linear>.before`` and ``<linear>.after``, float32 [K]; with measured keys also
        ``keys.before``, ``keys.pre_rope`` (after N) and ``keys.post_rope`` (after N and S), [kv_heads, H],
        before pairs are turned.
    """
    effect = {}
    for moment, block in (("before", before), ("after", after)):
        for name, absmax in _column_absmax(dict(block)).items():
            effect[f"{name}.{moment}"] = np.asarray(absmax)
    if keys is not None and transform is not None:
        pre_rope = jnp.tile(transform.pairs.scale, (1, 2))
        effect["keys.before"] = np.asarray(keys.channel_max)
        effect["keys.pre_rope"] = np.asarray(keys.channel_max * pre_rope)
        effect["keys.post_rope"] = np.asarray(keys.channel_max * pre_rope * transform.post_rope_scale)
    return effect


@jax.jit
def _column_absmax(block: Mapping[str, Array]) -> dict[str, Float[Array, " K"]]:
    """Of each linear layer; of all experts together."""
    return {
        name.removesuffix(".weight"): formats.finite_absmax(weight.reshape(-1, weight.shape[-1]), axis=0)
        for name, weight in fuse_block(block).items()
        if name.endswith("proj.weight")
    }


@jax.jit
def _relative_error(quantized: QuantizedTensor, weight: Float[Array, "N K"]) -> Float[Array, ""]:
    norm = jnp.linalg.norm(weight)
    return jnp.linalg.norm(quantized.dequantize() - weight) / jnp.where(norm > 0, norm, 1.0)


def _finish(
    source: HuggingFaceCheckpoint,
    options: ConversionOptions,
    tokens: Int[np.ndarray, "samples T"] | None,
    work: Path,
    seconds: float,
    first: int,
) -> dict[str, Any]:
    """The report; this run took ``seconds`` and began with block ``first``."""
    config = source.config
    blocks = {f"layers.{i}": json_files.read_json(work / f"block.{i}.json") for i in range(config.num_layers)}
    seconds += sum(blocks[f"layers.{i}"]["seconds"] for i in range(first))
    report = {
        "model": str(options.model),
        "recipe": options.recipe,
        "quantization": options.quantization.to_dict(),
        "calibration_tokens": 0 if tokens is None else int(tokens.size),
        "bytes_before": source.nbytes,
        "bytes_after": nnx.eval_shape(lambda: CausalLM(config, options.quantization, dtype=options.dtype)).nbytes,
        "seconds": round(seconds, 3),
        "peak_host_bytes": _peak_memory(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "layers": blocks,
    }
    effects = {
        f"layers.{i}.{name}": array
        for i in range(config.num_layers)
        if (path := work / f"smoothing.{i}.npz").is_file()
        for name, array in np.load(path).items()
    }
    if effects:
        _save_arrays(options.output / "smoothing.npz", effects)
    for name in COMPANION_FILES:
        if (options.model / name).is_file():
            shutil.copyfile(options.model / name, options.output / name)
    json_files.write_json(options.output / "report.json", report)
    folder.write_manifest(options.output, config, options.quantization)
    shutil.rmtree(work)
    return report


def _check_tokens(tokens: Int[np.ndarray, "samples T"], vocab_size: int, longest: int) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"calibration tokens have shape {tokens.shape}; expected [samples, length]")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"calibration tokens reach {tokens.max()}; the model's vocabulary has {vocab_size} entries")
    if tokens.shape[1] > longest:
        raise ValueError(f"calibration sequences have {tokens.shape[1]} tokens; the model's positions end at {longest}")


def _check_output(output: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
    folder.check_writable(output)
    if (output / folder.MANIFEST).exists():
        raise ValueError(f"{output} already holds a complete model; give another output folder or remove it")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is not a folder; give another output folder")
    work = output / folder.WORK_FOLDER
    options = work / "options.json"
    # Not even begun, or killed before the options were there.
    if not output.exists() or (set(output.iterdir()) <= {work} and (not work.exists() or _only_aside(work, options))):
        return
    if not options.is_file():
        raise ValueError(f"{output} is not empty and not an interrupted conversion; give another output folder")
    if not resume:
        raise ValueError(f"{output} holds an interrupted conversion; use --resume to go on, or remove it")
    before = json_files.read_json(options)
    if before != fingerprint:
        raise ValueError(f"cannot resume {output}: {_difference('', before, fingerprint)}")


def _difference(name: str, was: Any, now: Any) -> str:
    """Of two unequal values, or of the first unequal ones in two objects."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*was, *now}) if was.get(key) != now.get(key))
        return _difference(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    if name == "calibration":
        return "the calibration text, the number or length of its samples, or the seed is another"
    return f"{name} was {was!r} and is now {now!r}"


def _only_aside(work: Path, options: Path) -> bool:
    """Whether there is nothing in the work folder but what may become its first file."""
    return {path.name for path in work.iterdir()} <= {options.name + ".tmp"}


def _fingerprint(
    options: ConversionOptions, source: HuggingFaceCheckpoint, tokens: Int[np.ndarray, "samples T"] | None
) -> dict[str, Any]:
    """What must not change between an interrupted run and its continuation."""
    return {
        "model": str(options.model.resolve()),
        **{f"the model's {name}": value for name, value in source.config.to_dict().items()},
        **{f"{path.name}, size and time": [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files},
        "quantization": options.quantization.to_dict(),
        "dtype": options.dtype,
        "calibration": None if tokens is None else [*tokens.shape, hashlib.sha256(tokens.tobytes()).hexdigest()],
    }


def _cost(
    source: HuggingFaceCheckpoint, quantization: QuantizationConfig, tokens: Int[np.ndarray, "samples T"] | None
) -> str:
    config = source.config
    text = f"reads {source.nbytes / 1e9:.2f} GB twice (check, convert) in {config.num_layers} blocks"
    if tokens is None:
        return text + "; no calibration"
    parameters = sum(int(np.prod(shape)) for shape in block_shapes(config).values())
    operations = 2 * parameters * tokens.size
    states = 2 * tokens.size * config.hidden_size * 4
    if quantization.reads_text:
        operations += compensation_operations(config, quantization, *tokens.shape)
        states *= 2 if quantization.calibration_stream == "quantized" else 1
    return (
        f"{text}; calibration on {tokens.size} tokens: {operations * config.num_layers / 1e12:.2f} TFLOP and "
        f"{states / 1e9:.2f} GB of hidden states on disk"
    )


def _blocks_done(output: Path, blocks: int) -> int:
    """How many of the first blocks are committed."""
    return next((i for i in range(blocks) if not folder.part_path(output, f"layers.{i}").is_dir()), blocks)


def _hidden_path(work: Path, index: int) -> Path:
    """Hidden states that enter block ``index``."""
    return work / f"hidden.{index}.npy"


def _quantized_hidden_path(work: Path, index: int) -> Path:
    """Hidden states that enter block ``index`` of the quantized model."""
    return work / f"quantized_hidden.{index}.npy"


def _save_array(path: Path, array: np.ndarray) -> None:
    _write(path, lambda file: np.save(file, array))


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    _write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def _write(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    """Aside, then renamed; on a full disk numpy's error names no file."""
    aside = path.with_suffix(".tmp")
    try:
        with aside.open("wb") as file:
            save(file)
    except OSError as error:
        raise OSError(f"{aside} cannot be written: {error}; is the disk full?") from error
    aside.replace(path)


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
