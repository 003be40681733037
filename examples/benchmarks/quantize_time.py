"""How long ``fireq_plus`` takes to quantize a model, from one block of its shapes.

    python examples/benchmarks/quantize_time.py [--model llama3-8b] [--samples 128]

The block has random weights and reads random hidden states (correlated channels); it goes through the
converter's own steps: calibration, smoothing, compensation. The first block compiles everything, the
second is timed, and the model's blocks times that is the extrapolation. Reading and writing the
checkpoint's files is not in it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from end_to_end import MODELS

from checkpoints_convert.algorithms.gptq import InputMoments, quantize_measured
from checkpoints_convert.algorithms.smoothing import smooth_block
from checkpoints_convert.calibrate import Calibrator
from checkpoints_convert.compensation import Compensator
from fireq_jax import ModelConfig, recipes
from fireq_jax.models.block import block_shapes, fuse_block


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", choices=list(MODELS), default="llama3-8b")
    parse.add_argument("--recipe", choices=list(recipes.RECIPES), default="fireq_plus")
    parse.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    parse.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    parse.add_argument("--batch-size", type=int, default=8, help="windows a step (default: 8)")
    return parse


def main() -> None:
    """Compile, time a block, print."""
    args = parser().parse_args()
    config = MODELS[args.model]
    hidden = random_hidden(config, args.samples, args.length)
    print(f"{args.model}, {args.recipe}, {jax.devices()[0].device_kind}; warming up", flush=True)
    begin = time.perf_counter()
    quantize_block(config, args.recipe, hidden, args.batch_size)
    warm_up = time.perf_counter() - begin
    print(f"first block, with compilation: {warm_up:.1f} s", flush=True)
    begin = time.perf_counter()
    quantize_block(config, args.recipe, hidden, args.batch_size)
    seconds = time.perf_counter() - begin
    print(f"a block on {args.samples} windows of {args.length} tokens: {seconds:.2f} s")
    print(
        f"{config.num_layers} blocks, the first with compilation: {(config.num_layers - 1) * seconds + warm_up:.0f} s"
    )
    print("of that, rounding alone:", flush=True)
    time_rounding(config, args.recipe)


def quantize_block(config: ModelConfig, recipe: str, hidden: np.ndarray, batch_size: int) -> None:
    """One block by the converter's steps, each printed with its time."""
    quantization = recipes.by_name(recipe)
    block = random_block(config)
    _, statistics = timed("calibration", lambda: Calibrator(config, batch_size).run(block, 0, hidden))
    if quantization.smoothing is not None:
        smoothing, inputs = quantization.smoothing, {n: x.mean_abs for n, x in statistics.inputs.items()}
        keys, values = statistics.keys, statistics.values
        block = timed("smoothing", lambda: smooth_block(block, keys, config, smoothing, inputs, values))
    del statistics
    if quantization.reads_text:
        compensator = Compensator(config, quantization, batch_size)
        timed("compensation", lambda: compensator.quantize(block, 0, hidden, hidden, jnp.bfloat16))


def timed(name: str, call: Callable[[], Any]) -> Any:
    """The call's result, once it is on the device."""
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    print(f"  {name}: {time.perf_counter() - begin:.2f} s", flush=True)
    return result


def random_block(config: ModelConfig) -> dict[str, jax.Array]:
    """Float32 weights of one block, made on the device."""
    key = jax.random.key(0)
    return {
        name: jnp.ones(shape)
        if "norm" in name
        else jax.random.normal(jax.random.fold_in(key, i), shape) * shape[-1] ** -0.5
        for i, (name, shape) in enumerate(block_shapes(config).items())
    }


def random_hidden(config: ModelConfig, samples: int, length: int) -> np.ndarray:
    """Hidden states, float32 [samples, length, D], with a few strong directions as a model's have."""
    directions = jax.random.normal(jax.random.key(1), (32, config.hidden_size))

    @jax.jit
    def window(key: jax.Array) -> jax.Array:
        noise, strengths = jax.random.split(key)
        return jax.random.normal(noise, (length, config.hidden_size)) + (
            jax.random.normal(strengths, (length, len(directions))) @ directions
        )

    return np.stack([np.asarray(window(key)) for key in jax.random.split(jax.random.key(2), samples)])


def time_rounding(config: ModelConfig, recipe: str) -> None:
    """``quantize_measured`` of each linear layer, compiled before, with second moments of random inputs."""
    quantization = recipes.by_name(recipe)
    if not quantization.measures_inputs:
        return
    for name, weight in fuse_block(random_block(config)).items():
        if name.endswith("proj.weight"):
            inputs = jax.random.normal(jax.random.key(3), (4096, weight.shape[1]))
            hessian = inputs.T @ inputs / len(inputs)
            moments = InputMoments(hessian, hessian)
            timed(f"{name} {list(weight.shape)}", lambda: quantize_measured(weight, moments, quantization))  # noqa: B023


if __name__ == "__main__":
    main()
