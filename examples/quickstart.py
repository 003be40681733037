"""The whole way on the embedded model: convert, quantize, evaluate, generate. CPU, no network, minutes.

python examples/quickstart.py [--output FOLDER]
"""

import argparse
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.calibration_data import calibration_and_held_out
from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import LlamaForCausalLM, generate, recipes
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.evaluation.perplexity import perplexity
from fireq_jax.text_data import load_tokens

SOURCE = Path(__file__).parent / "tiny_llama"
RECIPES = ("rtn", "fireq", "fireq_plus")
WINDOW = 512
PROMPT = "The scale of a group"


def converted(recipe: str, output: Path, calibration: np.ndarray, held_out: np.ndarray) -> Path:
    """The embedded model under ``recipe``; made if it is not there yet, resumed if it is half there."""
    folder = output / recipe
    if not (folder / "fireq.json").is_file():
        options = ConversionOptions(SOURCE, folder, recipe, recipes.by_name(recipe))
        convert(options, calibration, held_out=held_out, resume=True)
    return folder


def main() -> None:
    """Print a perplexity table and a continuation by each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"), help="where converted models go")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    tokenizer = load_tokenizer(SOURCE)
    texts = calibration_and_held_out(SOURCE / "calibration.txt", tokenizer, samples=16, sequence_length=WINDOW)
    folders = {"bf16": SOURCE} | {name: converted(name, args.output, *texts) for name in RECIPES}
    text = load_tokens(SOURCE / "evaluation.txt", tokenizer)
    prompt = tokenizer(PROMPT, return_tensors="np")["input_ids"]

    print(f"\nJAX {jax.__version__} on {jax.devices()[0].device_kind}; perplexity over windows of {WINDOW} tokens")
    print(f"{'model':10} {'perplexity':>10} {'loss':>7} {'size':>8}")
    continuations, reference = {}, None
    for name, folder in folders.items():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=jnp.bfloat16)
        value = perplexity(model, text, window=WINDOW, progress=False).perplexity
        reference = reference or value
        print(f"{name:10} {value:10.3f} {value / reference - 1:7.1%} {model.nbytes / 1e6:5.1f} MB", flush=True)
        output = generate(model, prompt, max_new_tokens=48)
        new = output.sequences[0, prompt.shape[1] :][: int(output.lengths[0])]
        continuations[name] = tokenizer.decode(np.asarray(new))
    for name, continuation in continuations.items():
        print(f"\n{name}: {PROMPT}{continuation}")


if __name__ == "__main__":
    main()
