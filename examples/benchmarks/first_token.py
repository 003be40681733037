"""Time from a process's start to its first token, and where it goes, with and without cached compilation.

    PYTHONPATH=. python examples/benchmarks/first_token.py [--model DIR | --random llama3-8b] [--prompt-tokens 512]

Each run is a process of its own that does what ``fireq-generate`` does: it imports, reads the model and
meanwhile compiles for the prompt, and streams a few tokens. The first finds an empty compilation cache
(``jax_compilation_cache_dir``), the others what it left there.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fireq_jax.json_files import write_json

PHASES = ("imports", "device", "abstract model", "read and compile", "first token", "second token", "further tokens")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", type=Path, help="a converted or Hugging Face folder")
    parse.add_argument("--random", default="llama3-8b", help="else random weights of this model's shapes")
    parse.add_argument("--recipe", default="fireq_plus", help="of the random weights")
    parse.add_argument("--prompt-tokens", type=int, default=512)
    parse.add_argument("--new-tokens", type=int, default=128)
    parse.add_argument("--runs", type=int, default=3)
    parse.add_argument("--json", type=Path)
    parse.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parse


def run_child(args: argparse.Namespace) -> None:
    """Print the seconds of each phase as JSON."""
    started = float(os.environ["FIRST_TOKEN_STARTED"])
    marks = [started]

    def mark() -> None:
        marks.append(time.time())

    import jax
    import numpy as np

    from fireq_jax import LlamaForCausalLM
    from fireq_jax.checkpoints.folder import StoredModel
    from fireq_jax.generation import stream, warmup

    mark()
    jax.devices()
    mark()
    stored = StoredModel.open(args.model)
    abstract = LlamaForCausalLM.abstract(stored)
    prompt = np.random.default_rng(0).integers(0, stored.config.vocab_size, (1, args.prompt_tokens))
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens, "eos_token_ids": ()}
    mark()

    def read() -> tuple[LlamaForCausalLM, float]:
        model = jax.block_until_ready(abstract.filled(stored))
        return model, time.time() - marks[-1]

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        warmup(abstract, prompt, **options, only_prefill=True)
        ready = {"compiled after": time.time() - marks[-1]}
        model, ready["read after"] = reading.result()
    mark()
    for _ in stream(model, prompt, **options):
        mark()
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    further = seconds[len(PHASES) - 1 :]
    phases = [*seconds[: len(PHASES) - 1], sum(further) / len(further)]
    print(json.dumps(dict(zip(PHASES, phases, strict=True)) | ready))


def save_random(name: str, recipe: str, folder: Path) -> None:
    """A random model, in a process of its own so that the device is free afterwards."""
    program = (
        "import sys; from pathlib import Path; from end_to_end import MODELS, random_model\n"
        "from fireq_jax import recipes\n"
        f"random_model(MODELS[{name!r}], recipes.by_name({recipe!r}), 'auto').save(Path({str(folder)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def main() -> None:
    """Run the children, print a table."""
    args = parser().parse_args()
    if args.child:
        run_child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.model is None:
            args.model = Path(scratch) / "model"
            save_random(args.random, args.recipe, args.model)
        command = [sys.executable, __file__, "--child", "--model", str(args.model)]
        command += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        rows = []
        for _ in range(args.runs):
            environment = os.environ | cache | {"FIRST_TOKEN_STARTED": str(time.time())}
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
    columns = (*PHASES, "read after", "compiled after")
    print("| seconds | to the first token | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for i, row in enumerate(rows):
        total = sum(row[phase] for phase in PHASES[:5])
        name = "nothing cached" if i == 0 else "compilation cached"
        print(f"| {name} | {total:.2f} | " + " | ".join(f"{row[column]:.4f}" for column in columns) + " |")
    if args.json is not None:
        write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
