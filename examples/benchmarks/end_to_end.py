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
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fireq_jax import LlamaForCausalLM, ModelConfig, recipes
from fireq_jax.checkpoint import write_json
from fireq_jax.models import KVCache, RopeConfig
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


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that ends with its result on the device; compiled beforehand."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def prefill(graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array, capacity: int) -> tuple[jax.Array, KVCache]:
    """Last logits of each prompt and the cache."""
    return nnx.merge(graph, state).prefill(tokens, lengths, capacity)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def decode(graph: Any, state: Any, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """``DECODE_STEPS`` greedy steps."""
    model = nnx.merge(graph, state)

    def step(_: int, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        tokens, cache = carry
        logits, cache = model.extend(tokens[:, None], jnp.ones_like(tokens), cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, DECODE_STEPS, step, (tokens, cache))


def random_model(
    config: ModelConfig, quantization: QuantizationConfig, implementation: Implementation
) -> LlamaForCausalLM:
    """Random weights in storage format; made layer by layer, so that one layer's program is compiled."""

    @jax.jit
    def layer(key: jax.Array) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": jnp.bfloat16, "implementation": implementation, "rngs": nnx.Rngs(key)}
        return parameters_of(DecoderLayer("layers.0", config, quantization, **options))

    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, quantization, implementation=implementation))
    parameters = {}
    for i, key in enumerate(jax.random.split(jax.random.key(0), config.num_layers)):
        parameters |= {f"layers.{i}.{name}": value for name, value in layer(key).items()}
    for name, spec in parameters_of(model).items():
        if not name.startswith("layers."):
            assert not isinstance(spec, QuantizedTensor)
            parameters[name] = (jax.random.normal(jax.random.key(1), spec.shape, spec.dtype) * 0.02).astype(spec.dtype)
    return with_parameters(model, parameters)


def measure(recipe: str, args: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    """All shapes of one recipe; appends to ``rows`` and returns sizes."""
    config = MODELS[args.model]
    begin = time.perf_counter()
    model = random_model(config, recipes.by_name(recipe), args.implementation)
    graph, state = nnx.split(model)
    jax.block_until_ready(state)
    print(f"{recipe}: {model.nbytes / 1e9:.2f} GB, made in {time.perf_counter() - begin:.1f} s", flush=True)

    def report(phase: str, batch: int, context: int, seconds: float, tokens: int, floor: float) -> None:
        row = Row(recipe, phase, batch, context, seconds * 1e3, tokens / seconds, floor / seconds)
        rows.append(row)
        print(
            f"{recipe:18} {phase:8} {batch:4} x {context:6} {row.milliseconds:10.3f} ms "
            f"{row.tokens_per_second:12.1f} tokens/s  floor {row.floor_ratio:6.1%}",
            flush=True,
        )

    for batch, length in args.prefill:
        tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size)
        lengths = jnp.full((batch,), length, jnp.int32)
        seconds = median_seconds(lambda t=tokens, n=lengths: prefill(graph, state, t, n, t.shape[1])[0], args.repeats)
        report("prefill", batch, length, seconds, batch * length, prefill_operations(config, batch, length) / args.peak)
    for batch, context in args.decode:
        capacity = -(-(context + DECODE_STEPS) // 64) * 64
        empty = KVCache.create(config, model.quantization, batch, capacity)
        lengths = jnp.full((batch,), context, jnp.int32)

        def run(empty: KVCache = empty, lengths: jax.Array = lengths) -> jax.Array:
            cache = jax.tree.map(jnp.copy, dataclasses.replace(empty, lengths=lengths))
            return decode(graph, state, jnp.zeros_like(lengths), cache)[0]

        copies = median_seconds(lambda empty=empty: jax.tree.map(jnp.copy, empty), args.repeats)
        seconds = (median_seconds(run, args.repeats) - copies) / DECODE_STEPS
        moved = step_bytes(model, batch) + formats.nbytes(empty.layers) * context / capacity
        report("decode", batch, context, seconds, batch, moved / args.bandwidth)
    stats = jax.devices()[0].memory_stats() or {}
    return {"bytes": model.nbytes, "peak_device_bytes": stats.get("peak_bytes_in_use")}


def prefill_operations(config: ModelConfig, batch: int, length: int) -> float:
    """Multiply-adds, times two, of all linear layers and causal attention; one row of logits each."""
    linear = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    linear += 3 * config.hidden_size * config.intermediate_size
    attention = length / 2 * 2 * config.num_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    return 2.0 * batch * (length * config.num_layers * (linear + attention) + head)


def step_bytes(model: LlamaForCausalLM, batch: int) -> int:
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.68e12, help="bytes/s that a read can reach")
    parser.add_argument("--peak", type=float, default=1.6e15, help="FP8 operations/s that a matmul can reach")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = jax.devices()[0].device_kind
    print(f"{args.model} on {device}, JAX {jax.__version__}", flush=True)
    rows: list[Row] = []
    sizes = {recipe: measure(recipe, args, rows) for recipe in args.recipes}
    base = {(row.phase, row.batch, row.context): row.milliseconds for row in rows if row.recipe == args.recipes[-1]}
    print(f"\nspeed relative to {args.recipes[-1]}")
    for row in rows:
        ratio = base[row.phase, row.batch, row.context] / row.milliseconds
        print(f"{row.recipe:18} {row.phase:8} {row.batch:4} x {row.context:6} {ratio:6.2f}x")
    print(json.dumps(sizes))
    if args.json:
        fields = {"model": args.model, "device": device, "jax": jax.__version__, "sizes": sizes}
        write_json(args.json, fields | {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
