"""What one request waits for: its first token, the tokens after it as they stream, and all of them at once.

    PYTHONPATH=. python examples/benchmarks/latency.py [--model llama3-8b] [--prompts 128,512,1024,4096] [--json FILE]

A model with random weights and programs that are compiled already: what ``first_token.py`` measures comes once for a
process, this for each request. Wall times, medians. "Kernels" is what the GPU works for the first token; the rest is
the host's. A step is that of ``generate``, by what 64 further tokens take.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from end_to_end import MODELS, random_model
from timing import alone, kernel_times, median_seconds, require_hopper

from fireq_jax import generate, recipes
from fireq_jax.generation import stream
from fireq_jax.json_files import write_json


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt length, in milliseconds; tokens after the first are each."""

    prompt: int
    first_token: float
    kernels: float
    streamed_token: float
    step: float


def measure(model: Any, prompt: int, tokens: int, repeats: int) -> Row:
    """One prompt length; ``tokens`` are made in all, by programs that all of this shares."""
    ids = np.random.default_rng(prompt).integers(0, model.config.vocab_size, (1, prompt))
    options: dict[str, Any] = {"eos_token_ids": (), "cache_capacity": prompt + tokens}

    def streamed(count: int) -> None:
        for _ in itertools.islice(stream(model, ids, max_new_tokens=tokens, **options), count):
            pass

    def complete(count: int) -> None:
        jax.device_get(generate(model, ids, max_new_tokens=count, **options))

    def milliseconds(call: Callable[[], None]) -> float:
        return 1e3 * median_seconds(call, repeats)

    first = milliseconds(lambda: streamed(1))
    with alone():
        kernels = sum(us for _, us in kernel_times(lambda: streamed(1))) / 1e3
    each = (milliseconds(lambda: streamed(tokens)) - first) / (tokens - 1)
    step = (milliseconds(lambda: complete(tokens)) - milliseconds(lambda: complete(tokens - 64))) / 64
    return Row(prompt, first, kernels, each, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--recipe", default="fireq")
    parser.add_argument(
        "--prompts", type=lambda text: [int(part) for part in text.split(",")], default="128,512,1024,4096"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer, more than 64")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model != "tiny":
        require_hopper(parser)
    if args.tokens <= 65:
        parser.error(f"--tokens is {args.tokens}; expected more than 65")
    quantization = dataclasses.replace(recipes.by_name(args.recipe), lm_head_format="fp8")
    model = random_model(MODELS[args.model], quantization, "auto")
    device = jax.devices()[0].device_kind
    print(f"{args.model}, {args.recipe}, {device}, JAX {jax.__version__}\n")
    print("| prompt | first token, ms | its kernels, ms | a streamed token, ms | a step, ms |\n|---|---|---|---|---|")
    rows = []
    for prompt in args.prompts:
        row = measure(model, prompt, args.tokens, args.repeats)
        rows.append(dataclasses.asdict(row))
        numbers = f"{row.first_token:.2f} | {row.kernels:.2f} | {row.streamed_token:.3f} | {row.step:.3f}"
        print(f"| {prompt} | {numbers} |", flush=True)
    if args.json:
        write_json(args.json, {"model": args.model, "recipe": args.recipe, "device": device, "rows": rows})


if __name__ == "__main__":
    main()
