"""Prefill and decode speed of whole models with random weights, quantized and bf16, in one run.

    python examples/benchmarks/end_to_end.py [--model llama3-8b] [--json FILE]

Weights are made on the device in their storage format, so no checkpoint is needed. Each row states
the floor: for decode the bytes that a step must read (weights, and keys and values of the context)
over ``--bandwidth``; for prefill the matrix operations over ``--peak``. The ratio is floor / measured.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from timing import alone, compile_all, kernel_times, median_seconds, require_hopper

from fireq_jax import ModelConfig, recipes
from fireq_jax.json_files import write_json
from fireq_jax.models import CausalLM, KVCache, RopeConfig
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.layers import LayerOptions
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import parameters_of, with_parameters
from fireq_jax.quantization import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.dispatch import Implementation
from pallas_kernels.quantized_tensor import QuantizedTensor

MODELS = {
    "llama3-8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, max_position_embeddings=131072, rope=RopeConfig(theta=500000.0),
    ),
    "llama2-7b": ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, max_position_embeddings=4096,
    ),
    "llama2-13b": ModelConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40,
        head_dim=128, max_position_embeddings=4096,
    ),
    "qwen3-8b": config_from_huggingface({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960,
        "rope_theta": 1e6,
    }),
    "mistral-7b": config_from_huggingface({
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768, "rope_theta": 1e6,
    }),
    "gemma3-12b": config_from_huggingface({
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
        "max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }),
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128,
    ),
}  # fmt: skip
DECODE_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    recipe: str
    phase: str
    batch: int
    context: int
    milliseconds: float
    tokens_per_second: float
    floor_ratio: float


def shapes(text: str) -> list[tuple[int, int]]:
    """Parse "16x1024,1x8192" into (batch, tokens) pairs."""
    try:
        return [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(",") if part)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 16x1024,1x8192") from error


def prefill(graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
    """Last logits of each prompt and the cache."""
    return nnx.merge(graph, state).prefill(tokens, lengths, tokens.shape[1])


def decode(graph: Any, state: Any, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """``DECODE_STEPS`` greedy steps."""
    model = nnx.merge(graph, state)

    def step(_: int, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        tokens, cache = carry
        logits, cache = model.extend(tokens[:, None], jnp.ones_like(tokens), cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, DECODE_STEPS, step, (tokens, cache))


def random_model(config: ModelConfig, quantization: QuantizationConfig, implementation: Implementation) -> CausalLM:
    """Random weights in storage format; made layer by layer, so that one layer's program is compiled."""

    @jax.jit
    def layer(key: jax.Array) -> dict[str, Any]:
        options = LayerOptions(quantization, jnp.bfloat16, implementation, nnx.Rngs(key))
        return parameters_of(DecoderLayer("layers.0", 0, config, options))

    model = nnx.eval_shape(lambda: CausalLM(config, quantization, implementation=implementation))
    parameters = {}
    for i, key in enumerate(jax.random.split(jax.random.key(0), config.num_layers)):
        parameters |= {f"layers.{i}.{name}": value for name, value in layer(key).items()}
    for name, spec in parameters_of(model).items():
        if isinstance(spec, QuantizedTensor):
            if name == "lm_head":
                parameters[name] = QuantizedTensor.random(jax.random.key(1), spec.shape, format="fp8")
        elif not name.startswith("layers."):
            parameters[name] = (jax.random.normal(jax.random.key(1), spec.shape, spec.dtype) * 0.02).astype(spec.dtype)
    return with_parameters(model, parameters)


class Measurement:
    """All shapes of one recipe.

    Compiling is most of the time, so all programs are compiled side by side before anything runs.
    """

    def __init__(self, recipe: str, args: argparse.Namespace) -> None:
        begin = time.perf_counter()
        self.recipe, self.args, self.config = recipe, args, MODELS[args.model]
        quantization = dataclasses.replace(recipes.by_name(recipe), lm_head_format=args.lm_head)
        self.model = random_model(self.config, quantization, args.implementation)
        graph, self.state = nnx.split(self.model)
        jax.block_until_ready(self.state)
        print(f"{recipe}: {self.model.nbytes / 1e9:.2f} GB, made in {time.perf_counter() - begin:.1f} s", flush=True)
        begin = time.perf_counter()
        programs = {}
        for batch, length in args.prefill:
            tokens, lengths = jax.ShapeDtypeStruct((batch, length), jnp.int32), self._abstract(batch)
            program = jax.jit(functools.partial(prefill, graph))
            programs["prefill", batch, length] = program, (self.state, tokens, lengths)
        for batch, context in args.decode:
            program = jax.jit(functools.partial(decode, graph), donate_argnums=2)
            cache = jax.eval_shape(lambda b=batch, c=context: self._cache(b, c))
            programs["decode", batch, context] = program, (self.state, self._abstract(batch), cache)
        self.programs = compile_all(programs, {"xla_gpu_enable_command_buffer": ""} if args.no_graphs else None)
        print(f"{recipe}: {len(programs)} programs compiled in {time.perf_counter() - begin:.1f} s", flush=True)

    def _abstract(self, batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def _cache(self, batch: int, context: int) -> KVCache:
        capacity = -(-(context + DECODE_STEPS) // 64) * 64
        return KVCache.create(self.config, self.model.quantization, batch, capacity)

    def rows(self) -> Iterator[Row]:
        """One for each shape, as they are measured."""
        for (phase, batch, length), program in self.programs.items():
            try:
                run = self._prefill if phase == "prefill" else self._decode
                yield run(program, batch, length)
            except jax.errors.JaxRuntimeError as error:  # out of memory, most likely
                print(f"{self.recipe} {phase} {batch} x {length}: {str(error).splitlines()[0]}", flush=True)

    def _row(self, phase: str, batch: int, context: int, seconds: float, tokens: int, floor: float) -> Row:
        row = Row(self.recipe, phase, batch, context, seconds * 1e3, tokens / seconds, floor / seconds)
        print(
            f"{self.recipe:18} {phase:8} {batch:4} x {context:6} {row.milliseconds:10.3f} ms "
            f"{row.tokens_per_second:12.1f} tokens/s  floor {row.floor_ratio:6.1%}",
            flush=True,
        )
        return row

    def _prefill(self, program: Any, batch: int, length: int) -> Row:
        tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, self.config.vocab_size)
        lengths = jnp.full((batch,), length, jnp.int32)

        def run() -> jax.Array:
            return program(self.state, tokens, lengths)[0]

        seconds = median_seconds(run, self.args.repeats)
        floor = prefill_operations(self.config, batch, length) / self.args.peak
        row = self._row("prefill", batch, length, seconds, batch * length, floor)
        self._profile(run, 1)
        return row

    def _decode(self, program: Any, batch: int, context: int) -> Row:
        tokens, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), context, jnp.int32)
        cache = self._cache(batch, context)
        moved = step_bytes(self.model, batch) + formats.nbytes(cache.layers) * context / cache.capacity

        def run() -> jax.Array:
            # The cache is donated: each run goes on with the last one's memory.
            nonlocal cache
            cache = dataclasses.replace(cache, lengths=jnp.copy(lengths))
            chosen, cache = program(self.state, tokens, cache)
            return chosen

        seconds = median_seconds(run, self.args.repeats) / DECODE_STEPS
        row = self._row("decode", batch, context, seconds, batch, moved / self.args.bandwidth)
        self._profile(run, DECODE_STEPS)
        return row

    def _profile(self, run: Callable[[], Any], steps: int) -> None:
        if self.args.profile:
            with alone():
                records = kernel_times(run)
            print_kernels(records, steps)


def print_kernels(records: list[tuple[str, float]], steps: int) -> None:
    """Time of each kernel in one step; XLA's fusions, which have no names of their own, together."""
    total: dict[str, list[float]] = {}
    for name, us in records:
        own = name.endswith("mosaic_gpu_kernel") or name.startswith(("nvjet", "cudnn", "gemm"))
        total.setdefault(name.removesuffix("_mosaic_gpu_kernel") if own else "XLA", []).append(us)
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1])):
        print(f"    {name[:60]:60} {len(times) / steps:7.1f} x  {sum(times) / steps:10.1f} us", flush=True)


def prefill_operations(config: ModelConfig, batch: int, length: int) -> float:
    """Multiply-adds, times two, of all linear layers and causal attention; one row of logits each."""
    linear = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    linear += 3 * config.hidden_size * config.intermediate_size
    attention = length / 2 * 2 * config.num_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    return 2.0 * batch * (length * config.num_layers * (linear + attention) + head)


def step_bytes(model: CausalLM, batch: int) -> int:
    """Bytes of parameters that one decode step reads: all but the untouched rows of the embedding."""
    embedding = model.embed_tokens.get_value()
    if model.lm_head is None:
        return model.nbytes
    return model.nbytes - embedding.nbytes + batch * embedding.shape[1] * embedding.dtype.itemsize


def main() -> None:
    """Measure every recipe and print the ratios to bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--recipes", nargs="+", default=["fireq", "none"], help="'none' is the bf16 model")
    parser.add_argument("--prefill", type=shapes, default=shapes("16x1024,16x2048,16x4096,1x1024,1x8192"))
    parser.add_argument("--decode", type=shapes, default=shapes("1x1024,16x1024,64x1024,256x1024,1x8192,64x8192"))
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--lm-head", choices=["none", "fp8"], default="none", help="fp8: quantize lm_head as well")
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel by itself, not in CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="list the kernels of each shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.68e12, help="bytes/s that a read can reach")
    parser.add_argument("--peak", type=float, default=1.6e15, help="FP8 operations/s that a matmul can reach")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model != "tiny":
        require_hopper(parser)

    device = jax.devices()[0].device_kind
    print(f"{args.model} on {device}, JAX {jax.__version__}", flush=True)
    rows: list[Row] = []
    sizes = {}
    for recipe in args.recipes:
        measurement = Measurement(recipe, args)
        rows += measurement.rows()
        stats = jax.devices()[0].memory_stats() or {}
        sizes[recipe] = {"bytes": measurement.model.nbytes, "peak_device_bytes": stats.get("peak_bytes_in_use")}
        del measurement
    base = {(row.phase, row.batch, row.context): row.milliseconds for row in rows if row.recipe == args.recipes[-1]}
    print(f"\nspeed relative to {args.recipes[-1]}")
    for row in rows:
        if (row.phase, row.batch, row.context) in base:
            ratio = base[row.phase, row.batch, row.context] / row.milliseconds
            print(f"{row.recipe:18} {row.phase:8} {row.batch:4} x {row.context:6} {ratio:6.2f}x")
    print(json.dumps(sizes))
    if args.json:
        fields = {"model": args.model, "device": device, "jax": jax.__version__, "sizes": sizes}
        write_json(args.json, fields | {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
