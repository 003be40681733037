"""What recipes, and each piece of ``fireq_plus``, cost a model; or where one recipe loses it.

    python examples/quantization_report.py --output report            # the small model beside this file
    python examples/quantization_report.py --model DIR --calibration FILE --text FILE FILE --seeds 0 1 2 --output report
    python examples/quantization_report.py --apart fireq_plus --output apart

Calibrate on one text and evaluate on others: what a recipe has fitted to a text it does not lose there. ``loss`` is
perplexity over the float model's, minus 1; ``KL`` is the mean Kullback-Leibler divergence of the next-token
distribution from the float model's, in nats, which depends less on which text was drawn.

Without ``--apart`` every row is converted once a seed (a seed chooses the calibration windows). A row of the small
model takes a minute or so on two CPU cores, one that learns several, and there are forty.

With it, the recipe is converted twice, as it is and with float weights, and then taken apart without converting
again: the weights of each kind and of each layer, activations, queries, keys, values and attention weights are rounded
alone, and all but each of them (``fireq_jax.evaluation.sensitivity``). The page also shows massive activations,
attention sinks and outlier channels by layer. What it will take is said first.

Results are kept in ``report.json`` (``apart.json``) as they come: the same command again goes on where it stopped.
They are drawn in ``report.html``, ``report.md`` and ``costs.png``.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32

from checkpoints_convert.calibration_data import sample_windows
from checkpoints_convert.conversion import ConversionOptions, convert, needs_calibration
from fireq_jax import AutoModelForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import exit_code
from fireq_jax.evaluation.activations import measure_activations
from fireq_jax.evaluation.costs import average, cost_table, format_costs, load_report, measure_pieces, plot_costs
from fireq_jax.evaluation.perplexity import perplexity
from fireq_jax.evaluation.plots import subject_of
from fireq_jax.evaluation.report import model_section, versions
from fireq_jax.evaluation.sensitivity import Sensitivity, kept_nbytes, pieces_of
from fireq_jax.evaluation.web_page import code, definitions, paragraph, picture, table, write_page
from fireq_jax.json_files import write_json
from fireq_jax.text_data import load_tokens

TINY = Path(__file__).parent / "tiny_llama"
# Of the rows that learn.
LEARNED_STEPS = 200
# Windows whose activations are looked at.
WINDOWS_LOOKED_AT = 4
Texts = Mapping[str, Int[np.ndarray, "windows T"]]


def rows() -> dict[str, QuantizationConfig]:
    """Name -> config of every row: recipes, their halves, and the halves of ``fireq_plus`` without one piece."""
    replace, plus = dataclasses.replace, recipes.fireq_plus()
    smoothing = plus.smoothing
    assert smoothing is not None
    weights, cache = plus.with_kv_format("none"), plus.with_float_weights()
    result = {}
    for name in ("rtn", "fireq", "fireq_plus"):
        recipe = recipes.by_name(name)
        result |= {
            name: recipe,
            f"{name}, float KV": recipe.with_kv_format("none"),
            f"{name}, float weights": recipe.with_float_weights(),
        }
    for codebook in ("fp4", "nf4"):
        result[f"plus, float KV + {codebook}"] = replace(weights, weight_format=codebook)
    fireq = recipes.fireq()
    assert fireq.smoothing is not None
    searched = replace(fireq, smoothing=replace(fireq.smoothing, search_columns=True, search_keys=True))
    start = replace(smoothing, search_keys=True, query_exponent=0.0)
    result |= {
        "fireq + searched smoothing": searched,
        "fireq, float KV + searched columns": searched.with_kv_format("none"),
        "fireq, float weights + searched keys": searched.with_float_weights(),
        "plus, float KV + searched columns": replace(weights, smoothing=replace(smoothing, search_columns=True)),
        "plus, float weights + searched start": replace(cache, smoothing=start),
    }
    learned = {"learned_steps": LEARNED_STEPS}
    result["fireq, learned"] = replace(recipes.fireq(), **learned)
    for name, whole in (("plus", plus), ("plus, float KV", weights)):
        result[f"{name} + learned"] = replace(whole, **learned)
        result[f"{name} - error compensation + learned"] = replace(whole, **learned, error_compensation=False)
    pieces = {
        "error compensation": {"error_compensation": False},
        "scale search": {"scale_search": False},
        "table rounding": {"rounding": "nearest"},
        "quantized stream": {"calibration_stream": "float"},
        "smoothing": {"smoothing": None},
    }
    result |= {f"plus, float KV - {piece}": replace(weights, **change) for piece, change in pieces.items()}
    result["plus, float KV + activation exponent 0.25"] = replace(
        weights, smoothing=replace(smoothing, activation_exponent=0.25)
    )
    result["plus, float KV + bf16 scales"] = replace(weights, scale_dtype="bf16")
    pieces = {
        "key offset": {"key_offset": False},
        "fit of key pairs": {"fit_pairs": False},
        "fit of key pairs, query exponent": {"fit_pairs": False, "query_exponent": 0.0},
        "N altogether": {"fit_pairs": False, "pre_rope": False},
        "balanced values": {"value_basis": "channels"},
        "balanced values + Hadamard": {"value_basis": "hadamard"},
    }
    for piece, change in pieces.items():
        result[f"plus, float weights - {piece}"] = replace(cache, smoothing=replace(smoothing, **change))
    result["plus, float weights - unbiased keys"] = replace(cache, unbiased_keys=False)
    result["plus, float weights - clips"] = replace(cache, key_clip=1.0, value_clip=1.0)
    result["plus, float weights + KV groups of 64"] = replace(cache, kv_group_size=64)
    result["plus, float weights, FP8 KV"] = replace(cache, kv_format="fp8")
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__,
        epilog="rows:\n  " + "\n  ".join(rows()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--model", type=Path, default=TINY, help="Hugging Face folder")
    parse.add_argument("--calibration", default=str(TINY / "calibration.txt"), help="text to measure activations on")
    parse.add_argument("--text", nargs="+", default=[str(TINY / "evaluation.txt")], help="texts to evaluate on")
    parse.add_argument("--output", type=Path, required=True, help="folder for the results")
    parse.add_argument("--apart", metavar="RECIPE", help="take this recipe apart, instead of measuring rows")
    parse.add_argument("--rows", nargs="+", choices=list(rows()), metavar="ROW", help="some rows only (below)")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows (default: 0)")
    parse.add_argument("--calibration-samples", type=int, default=16, help="windows to calibrate on (default: 16)")
    parse.add_argument("--window", type=int, default=1024, help="tokens of any window (default: 1024)")
    parse.add_argument("--windows", type=int, default=16, help="windows to evaluate on, of each text (default: 16)")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    args.command = ["python", "examples/quantization_report.py", *(sys.argv[1:] if arguments is None else arguments)]
    return exit_code("quantization_report.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure what is missing from the report and write it anew."""
    if args.apart is not None and (args.rows or len(args.seeds) > 1):
        raise ValueError("--apart takes one recipe apart, with one seed; expected no --rows and no more --seeds")
    recipe = None if args.apart is None else recipes.by_name(args.apart)
    tokenizer = load_tokenizer(args.model)
    texts = {str(text): first_windows(text, load_tokens(text, tokenizer), args) for text in args.text}
    calibration = load_tokens(args.calibration, tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(args.model),
        "calibration": f"{args.calibration_samples} windows of {args.window} tokens of {args.calibration}",
        "evaluation": [f"{len(windows)} windows of {args.window} tokens of {text}" for text, windows in texts.items()],
    }
    if recipe is None:
        costs, sections = measure_rows(args, settings, calibration, texts)
        title = f"What recipes cost {args.model.name}"
    else:
        settings |= {"recipe": args.apart, "seed": args.seeds[0]}
        costs, sections = take_apart(args, settings, recipe, calibration, texts)
        title = f"Where {args.apart} loses {args.model.name}"
    figure = plot_costs(costs, title)
    figure.savefig(args.output / "costs.png")
    entries = [(name, value if isinstance(value, str) else str(value)) for name, value in settings.items()]
    (args.output / "report.md").write_text(format_costs(costs), encoding="utf-8")
    parts = [
        ("Costs", picture(figure, title) + cost_table(costs)),
        *sections,
        ("Protocol", definitions([*entries, *versions()])),
        ("To make this page again", code(shlex.join(args.command))),
    ]
    write_page(args.output / "report.html", title, parts)
    print(format_costs(costs))
    print(f"report in {args.output / 'report.html'}")


def first_windows(
    text: str, stream: Int32[np.ndarray, " tokens"], args: argparse.Namespace
) -> Int32[np.ndarray, "windows T"]:
    """The first windows of a text, as many as are asked for or there are."""
    count = min(args.windows, len(stream) // args.window)
    if count < 1:
        raise ValueError(f"{text} has {len(stream)} tokens; expected at least one window of {args.window}")
    return stream[: count * args.window].reshape(count, args.window)


def samples_for(
    config: QuantizationConfig, calibration: Int32[np.ndarray, " tokens"], args: argparse.Namespace, seed: int
) -> Int32[np.ndarray, "samples T"] | None:
    """Calibration windows, if the config measures anything."""
    sizes = {"samples": args.calibration_samples, "sequence_length": args.window}
    return sample_windows(calibration, **sizes, seed=seed) if needs_calibration(config) else None


def take_apart(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    recipe: QuantizationConfig,
    calibration: Int32[np.ndarray, " tokens"],
    texts: Texts,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Costs of a recipe's pieces, and the sections of the page that are about activations."""
    in_float = dataclasses.replace(recipe.with_float_weights().with_kv_format("none"), lm_head_format="none")
    models = []
    for name, config in (("float", in_float), (args.apart, recipe)):
        options = ConversionOptions(args.model, args.output / f"model-{name}", name, config, "float32")
        convert(options, samples_for(config, calibration, args, args.seeds[0]), resume=True)
        models.append(AutoModelForCausalLM.from_pretrained(options.output, dtype=jnp.float32))
    exact, quantized = models
    nbytes = kept_nbytes(exact.config, texts)
    print(f"{nbytes / 1e9:.2f} GB of hidden states and {(exact.nbytes + quantized.nbytes) / 1e9:.2f} GB of models")
    sensitivity = Sensitivity(exact, quantized, texts)
    report = measure_pieces(sensitivity, pieces_of(exact.config, recipe), args.output / "apart.json", settings)
    windows = next(iter(texts.values()))[:WINDOWS_LOOKED_AT]
    before = measure_activations(AutoModelForCausalLM.from_pretrained(args.model), windows)
    after = measure_activations(quantized, windows)
    folder = args.output / f"model-{args.apart}"
    subject = subject_of(args.apart, folder, after, (args.model.name, before))
    exactly = paragraph(
        "Every piece is compared with the float model in the basis that the recipe brings it to. Costs alone need not "
        "add up to that of everything: errors may cancel, or make one another worse."
    )
    return report["costs"], [("What this says", exactly), ("Activations and layers", model_section(subject))]


def measure_rows(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    calibration: Int32[np.ndarray, " tokens"],
    texts: Texts,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Costs of all rows, means over the seeds, and a section about their sizes."""
    path = args.output / "report.json"
    report = load_report(path, settings)
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=jnp.float32)
    report["float perplexity"] = {
        text: perplexity(exact, windows.reshape(-1), window=args.window).perplexity for text, windows in texts.items()
    }
    print(f"float: perplexity {report['float perplexity']}", flush=True)
    names = args.rows or list(rows())
    for number, name in enumerate(names, start=1):
        config = rows()[name]
        runs = report.setdefault("runs", {}).setdefault(name, {})
        for seed in args.seeds if needs_calibration(config) else args.seeds[:1]:
            if str(seed) in runs:
                continue
            print(f"row {number} of {len(names)}: {name}, seed {seed}", flush=True)
            runs[str(seed)], sizes = measure(
                args, config, samples_for(config, calibration, args, seed), exact, report["float perplexity"], texts
            )
            report["costs"][name] = average(list(runs.values()))
            report.setdefault("sizes", {})[name] = sizes
            report.setdefault("configs", {})[name] = config.to_dict()
            write_json(path, report)
            found = ", ".join(f"{cost['divergence']:.4f}" for cost in runs[str(seed)].values())
            print(f"{name}, seed {seed}: KL {found} nats", flush=True)
    sizes = [[name, f"{made['megabytes']:.2f}", f"{made['seconds']:.0f}"] for name, made in report["sizes"].items()]
    return report["costs"], [("Sizes", table(["row", "MB", "seconds to convert"], sizes))]


def measure(
    args: argparse.Namespace,
    config: QuantizationConfig,
    samples: Int[np.ndarray, "samples T"] | None,
    exact: AutoModelForCausalLM,
    before: Mapping[str, float],
    texts: Texts,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Convert to a temporary folder and evaluate: costs by text, and what the conversion took.

    ``before``: the float model's perplexity, by text.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ConversionOptions(args.model, Path(folder) / "model", "report", config)
        made = convert(options, samples, progress=False)
        quantized = AutoModelForCausalLM.from_pretrained(options.output, dtype=jnp.float32)
    costs = {}
    for text, windows in texts.items():
        found = perplexity(quantized, windows.reshape(-1), reference=exact, window=args.window, progress=False)
        loss = found.perplexity / before[text] - 1
        costs[text] = {
            "perplexity": found.perplexity,
            "loss": loss,
            "divergence": found.divergence,
            "agreement": found.agreement,
        }
    return costs, {"megabytes": made["bytes_after"] / 1e6, "seconds": made["seconds"]}


if __name__ == "__main__":
    sys.exit(main())
