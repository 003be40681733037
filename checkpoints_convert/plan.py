"""What a conversion is going to do and what it costs, said before it does anything."""

import collections
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from checkpoints_convert.compensation import compensation_operations
from checkpoints_convert.held_out import Streams
from fireq_jax.models.block import FLOAT32, block_shapes, global_shapes, linear_names, linears_of
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.kv_cache import slot_bytes
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import dispatch, formats
from pallas_kernels.quantized_tensor import QuantizedTensor

_FLOAT32 = 4  # bytes
# Arrays of a block that are there at once: as it was read, smoothed, and as the model's layer.
_BLOCKS = 3
# Of K x K: the moments of a layer's inputs, and what GPTQ makes of them.
_MOMENTS = 5


@dataclasses.dataclass(frozen=True)
class Work:
    """A conversion, as far as its cost depends on it.

    Attributes:
        config: the architecture, as it is read.
        quantization: as it is applied.
        output: where to.
        dtype: of what stays float.
        batch_size: calibration windows a step.
        nbytes: of the checkpoint; None before it is there.
        text: calibration windows, and tokens of each; None for a recipe that reads none.
        held_out: windows held out, of as many tokens.
        kept: linear layers that keep the checkpoint's codes; None before that is known.
    """

    config: ModelConfig
    quantization: QuantizationConfig
    output: Path
    dtype: str
    batch_size: int
    nbytes: int | None
    text: tuple[int, int] | None
    held_out: int = 0
    kept: Collection[str] | None = ()


def plan_of(work: Work) -> list[str]:
    """What the conversion reads, computes, stores and keeps, a line each.

    A matrix product is timed if there is calibration (:func:`matmul_rate`); nothing is written.
    """
    return [
        *_reading(work),
        *_sizes(work),
        *_floats(work),
        *_cache(work),
        *_memory(work),
        *_disk(work),
        *_occupied(work.output),
    ]


@functools.cache
def matmul_rate() -> float:
    """float32 operations a second of the default device, as calibration multiplies; takes some milliseconds."""
    n = 768 if dispatch.default_device().platform == "cpu" else 4096
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    x = jnp.full((n, n), 1 / n)
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def operations_of(work: Work) -> int:
    """About how many float32 operations calibration is; 0 without."""
    if work.text is None:
        return 0
    (samples, length), parameters = work.text, _parameters(work.config)
    passes = 1 + len(Streams._fields) * work.held_out / samples
    operations = int(2 * parameters * samples * length * passes)
    if work.quantization.reads_text:
        operations += compensation_operations(work.config, work.quantization, samples, length)
    return operations * work.config.num_layers


def _reading(work: Work) -> Iterator[str]:
    blocks = f"twice (check, convert) in {work.config.num_layers} blocks"
    yield f"reads {_gigabytes(_before(work))}{'' if work.nbytes else ' (as bfloat16)'} {blocks}"
    if work.text is None:
        yield "no calibration: time is that of reading, rounding and writing"
        return
    tokens, rate = math.prod(work.text), matmul_rate()
    operations = operations_of(work)
    yield (
        f"calibrates on {tokens} tokens, {work.held_out * work.text[1]} held out: {operations / 1e12:.3g} TFLOP, at "
        f"least {_duration(operations / rate)} of matrix products at {rate / 1e12:.2g} TFLOP/s, measured here; "
        "compilation and the steps of rounding come on top"
    )


def _sizes(work: Work) -> Iterator[str]:
    linears, other = _linear_bytes(work), _other_bytes(work)
    after = sum(linears.values()) + other
    group = f" in groups of {work.quantization.group_size}, {work.quantization.scale_dtype} scales"
    each = ", ".join(
        f"{name}{group if name in formats.CODEBOOKS else ''}: {_gigabytes(size)}" for name, size in linears.items()
    )
    yield f"from {_gigabytes(_before(work))} to {_gigabytes(after)}: linear layers {each}; all else {_gigabytes(other)}"


def _floats(work: Work) -> Iterator[str]:
    quantization, names = work.quantization, linear_names(work.config)
    activations = "FP8 by token" if quantization.activation_format == "fp8" else "as they are"
    found = collections.Counter(quantization.weight_format_of(name) for name in names)
    formatted = ", ".join(f"{count} in {name}" for name, count in found.items() if name != "none")
    yield f"linear layers: {formatted or 'none quantized'}; their inputs: {activations}"
    if floats := [name for name in names if quantization.keeps_float(name)]:
        yield f"{len(floats)} linear layers stay {work.dtype}, as recipe and options say: {_some(floats)}"
    if work.kept is None:
        yield "which layers keep the codes of the quantized checkpoint is known once its weights are here"
    elif work.kept:
        yield f"{len(work.kept)} linear layers keep the checkpoint's codes: {_some(sorted(work.kept))}"
    tied = ", tied to the embeddings" if work.config.tie_word_embeddings else ""
    head = "FP8 by channel" if quantization.lm_head_format == "fp8" else f"{work.dtype}{tied} (--lm-head-format)"
    yield f"embeddings stay {work.dtype}, norms float32; the head is {head}"


def _cache(work: Work) -> Iterator[str]:
    quantization = work.quantization
    layers = [quantization.for_attention(f"layers.{i}.self_attn").kv_format for i in range(work.config.num_layers)]
    counts = collections.Counter(work.dtype if name == "none" else name for name in layers)
    each = ", ".join(f"{name} in {count} layers" for name, count in counts.items())
    size, plain = (slot_bytes(work.config, each, work.dtype) for each in (quantization, recipes.none()))
    yield f"cache: {each}; {size} bytes a token, {plain} as {work.dtype}"


def _memory(work: Work) -> Iterator[str]:
    config = work.config
    device = _BLOCKS * _FLOAT32 * _parameters(config)
    if work.quantization.measures_inputs:
        experts = 1 if config.experts is None else config.experts.count
        widest = max(config.hidden_size, config.num_heads * config.head_dim), config.intermediate_size
        device += _MOMENTS * _FLOAT32 * max(widest[0] ** 2, experts * widest[1] ** 2)
    if work.text is not None:
        width = 2 * config.hidden_size + 3 * config.intermediate_size
        device += _FLOAT32 * work.batch_size * work.text[1] * width
    host = 2 * _FLOAT32 * config.vocab_size * config.hidden_size
    sizes = f"{_gigabytes(device)} on the device for a block, {_gigabytes(host)} on the host for embeddings"
    yield f"memory beside JAX itself: about {sizes}"


def _disk(work: Work) -> Iterator[str]:
    output = sum(_linear_bytes(work).values()) + _other_bytes(work)
    states = 0
    if work.text is not None:
        samples, length = work.text
        streams = 1 + (work.quantization.reads_text and work.quantization.calibration_stream == "quantized")
        rows = length * (samples * streams + work.held_out * len(Streams._fields))
        states = 2 * rows * work.config.hidden_size * _FLOAT32  # of a block's input and output
    there = next(path for path in (work.output.absolute(), *work.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    yield (
        f"disk: {_gigabytes(output)} in {work.output}, and {_gigabytes(states)} of hidden states there while it runs; "
        f"{_gigabytes(free)} free{', WHICH IS TOO LITTLE' if free < output + states else ''}"
    )


def _occupied(output: Path) -> Iterator[str]:
    if output.is_dir() and any(output.iterdir()):
        yield f"{output} is not empty: only a conversion that was begun there goes on there, with --resume"


def _parameters(config: ModelConfig) -> int:
    """Of a block."""
    return sum(math.prod(shape) for shape in block_shapes(config).values())


def _before(work: Work) -> int:
    """Bytes of the checkpoint, or of one in bfloat16."""
    if work.nbytes is not None:
        return work.nbytes
    outside = sum(math.prod(shape) for shape in global_shapes(work.config).values())
    return 2 * (work.config.num_layers * _parameters(work.config) + outside)


def _linear_bytes(work: Work) -> dict[str, int]:
    """Bytes of all linear layers' weights, by their format."""
    sizes: dict[str, int] = collections.Counter()
    quantization, shapes = work.quantization, block_shapes(work.config)
    for name in linear_names(work.config):
        linear = next(linear for linear in linears_of(work.config) if name.endswith(f".{linear.name}"))
        parts = [shapes[f"{part}.weight"] for part in linear.parts]
        *stack, n, k = (*parts[0][:-2], sum(shape[-2] for shape in parts), parts[0][-1])
        own = quantization.weight_format_of(name)
        size = _weight_bytes(n, k, own, quantization.group_size, quantization.scale_dtype, work.dtype)
        sizes[work.dtype if own == "none" else own] += math.prod(stack) * size
    return sizes


@functools.cache
def _weight_bytes(
    n: int, k: int, weight_format: str, group_size: int, scale_dtype: formats.ScaleDtype, dtype: str
) -> int:
    if weight_format == "none":
        return n * k * jnp.dtype(dtype).itemsize
    make = functools.partial(QuantizedTensor.random, format=weight_format, shape=(n, k))
    return formats.nbytes(
        jax.eval_shape(lambda: make(jax.random.key(0), group_size=group_size, scale_dtype=scale_dtype))
    )


def _other_bytes(work: Work) -> int:
    """Bytes of embeddings, head, norms, biases and what else is no linear layer's weight."""
    config, quantization, itemsize = work.config, work.quantization, jnp.dtype(work.dtype).itemsize
    inside = sum(
        math.prod(shape) * (_FLOAT32 if any(part in name for part in FLOAT32) else itemsize)
        for name, shape in block_shapes(config).items()
        if not name.endswith("proj.weight")
    )
    outside = sum(
        math.prod(shape) * (_FLOAT32 if "norm" in name else itemsize)
        for name, shape in global_shapes(config).items()
        if name != "lm_head" or quantization.lm_head_format == "none"
    )
    if quantization.lm_head_format == "fp8":
        outside += config.vocab_size * (config.hidden_size + _FLOAT32)
    elif config.tie_word_embeddings and quantization.rotates:
        outside += config.hidden_size**2 * itemsize
    return config.num_layers * inside + outside


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
