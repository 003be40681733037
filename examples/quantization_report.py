"""What each recipe, and each piece of ``fireq_plus``, costs a model: perplexity, divergence and size.

    python examples/quantization_report.py --output report            # the small model beside this file
    python examples/quantization_report.py --model DIR --calibration FILE --text FILE --seeds 0 1 2 --output report

Every row is converted once a seed (a seed chooses the calibration windows) and evaluated on the
same windows of text. ``loss`` is perplexity over the float model's, minus 1; ``divergence`` is the
mean Kullback-Leibler divergence of the next-token distribution from the float model's, which
depends less on which text was drawn. Finished rows are kept in ``report.json``: running the same
command again goes on where it stopped. A row of the small model takes a minute or so on two CPU
cores, one that learns several, and there are forty.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from checkpoints_convert.calibration_data import sample_windows
from checkpoints_convert.conversion import ConversionOptions, convert, needs_calibration
from fireq_jax import AutoModelForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import exit_code
from fireq_jax.json_files import read_json, write_json
from fireq_jax.text_data import load_tokens

TINY = Path(__file__).parent / "tiny_llama"
# Of the rows that learn.
LEARNED_STEPS = 200


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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One conversion's result; see the module's docstring."""

    perplexity: float
    loss: float
    divergence: float
    megabytes: float
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__,
        epilog="rows:\n  " + "\n  ".join(rows()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--model", type=Path, default=TINY, help="Hugging Face folder")
    parse.add_argument("--calibration", default=TINY / "calibration.txt", help="text to measure activations on")
    parse.add_argument("--text", default=TINY / "evaluation.txt", help="text to evaluate on")
    parse.add_argument("--output", type=Path, required=True, help="folder for report.json, report.md and loss.png")
    parse.add_argument("--rows", nargs="+", choices=list(rows()), metavar="ROW", help="some rows only (below)")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows (default: 0)")
    parse.add_argument("--calibration-samples", type=int, default=16, help="windows to calibrate on (default: 16)")
    parse.add_argument("--window", type=int, default=1024, help="tokens of any window (default: 1024)")
    parse.add_argument("--windows", type=int, default=16, help="windows to evaluate on, at most (default: 16)")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    return exit_code("quantization_report.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure what is missing from the report and write it anew."""
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model)
    stream = load_tokens(args.text, tokenizer)
    count = min(args.windows, len(stream) // args.window)
    if count < 1:
        raise ValueError(f"{args.text} has {len(stream)} tokens; expected at least one window of {args.window}")
    windows = stream[: count * args.window].reshape(count, args.window)
    calibration = load_tokens(args.calibration, tokenizer)
    settings = {
        "model": str(args.model),
        "calibration": f"{args.calibration_samples} windows of {args.window} tokens of {args.calibration}",
        "evaluation": f"{count} windows of {args.window} tokens of {args.text}",
    }
    report = load_report(args.output / "report.json", settings)
    reference = FloatReference(args.model, windows)
    report["float perplexity"] = reference.perplexity
    print(f"float: perplexity {reference.perplexity:.4f}", flush=True)
    names = args.rows or list(rows())
    for i, name in enumerate(names):
        config = rows()[name]
        for seed in args.seeds if needs_calibration(config) else args.seeds[:1]:
            done = report["rows"].setdefault(name, {})
            if str(seed) in done:
                continue
            print(f"row {i + 1} of {len(names)}: {name}", flush=True)
            samples = sample_windows(
                calibration, samples=args.calibration_samples, sequence_length=args.window, seed=seed
            )
            measured = measure(args.model, config, samples, reference)
            done[str(seed)] = dataclasses.asdict(measured)
            report.setdefault("configs", {})[name] = config.to_dict()
            write_json(args.output / "report.json", report)
            print(
                f"{name} (seed {seed}): perplexity {measured.perplexity:.4f}, loss {measured.loss:.2%}, "
                f"divergence {measured.divergence:.4f}, {measured.seconds:.0f} s",
                flush=True,
            )
    table = format_table(report)
    (args.output / "report.md").write_text(table, encoding="utf-8")
    plot_losses(report, args.output / "loss.png")
    print(table)


class FloatReference:
    """The float model's log-probabilities on the evaluation windows.

    Held in memory as float32 [windows, T, vocabulary], which is right for small models only.
    """

    def __init__(self, model: Path, windows: Int[np.ndarray, "W T"]) -> None:
        self.windows = windows
        graph, state = nnx.split(AutoModelForCausalLM.from_pretrained(model, dtype=jnp.float32))
        self.log_probabilities = np.stack(
            [np.asarray(log_probabilities(graph, state, jnp.asarray(tokens))) for tokens in windows]
        )
        picked = np.take_along_axis(self.log_probabilities[:, :-1], windows[:, 1:, None].astype(np.int64), axis=-1)
        self.perplexity = float(np.exp(-picked.mean(dtype=np.float64)))

    def compare(self, model: AutoModelForCausalLM) -> tuple[float, float]:
        """Perplexity of another model, and its divergence from this one."""
        graph, state = nnx.split(model)
        results = [
            compare_window(graph, state, jnp.asarray(tokens), jnp.asarray(own))
            for tokens, own in zip(self.windows, self.log_probabilities, strict=True)
        ]
        nll, divergence = np.mean(np.asarray(results, np.float64), axis=0)
        return float(np.exp(nll)), float(divergence)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(
    graph: nnx.GraphDef[AutoModelForCausalLM], state: nnx.State, tokens: Int[Array, " T"]
) -> Float[Array, "T V"]:
    """Log-probabilities of the token after each position."""
    return jax.nn.log_softmax(nnx.merge(graph, state)(tokens[None])[0])


@functools.partial(jax.jit, static_argnums=0)
def compare_window(
    graph: nnx.GraphDef[AutoModelForCausalLM],
    state: nnx.State,
    tokens: Int[Array, " T"],
    reference: Float[Array, "T V"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean negative log-likelihood, and mean divergence from ``reference``, of tokens 1 onwards."""
    own = log_probabilities(graph, state, tokens)[:-1]
    expected = reference[:-1]
    picked = jnp.take_along_axis(own, tokens[1:, None], axis=-1)
    return -jnp.mean(picked), jnp.mean(jnp.sum(jnp.exp(expected) * (expected - own), axis=-1))


def measure(
    model: Path, config: QuantizationConfig, samples: Int[np.ndarray, "samples T"], reference: FloatReference
) -> Measurement:
    """Convert to a temporary folder and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        options = ConversionOptions(model, Path(folder) / "model", "report", config)
        report = convert(options, samples if needs_calibration(config) else None, progress=False)
        quantized = AutoModelForCausalLM.from_pretrained(options.output, dtype=jnp.float32)
    perplexity, divergence = reference.compare(quantized)
    return Measurement(
        perplexity=perplexity,
        loss=perplexity / reference.perplexity - 1,
        divergence=divergence,
        megabytes=report["bytes_after"] / 1e6,
        seconds=report["seconds"],
    )


def load_report(path: Path, settings: dict[str, str]) -> dict[str, Any]:
    """An earlier report of the same settings, or an empty one."""
    if not path.is_file():
        return {"settings": settings, "rows": {}}
    report = read_json(path)
    if report["settings"] != settings:
        raise ValueError(f"{path} was measured with {report['settings']}; give another --output")
    return report


def format_table(report: dict[str, Any]) -> str:
    """Markdown: mean and, over several seeds, standard deviation of every row."""
    lines = [f"- {name}: {value}" for name, value in report["settings"].items()]
    lines += [f"- float perplexity: {report['float perplexity']:.4f}", ""]
    lines += ["| row | seeds | perplexity | loss % | divergence | MB | seconds |", "|---|---|---|---|---|---|---|"]
    for name, measured in report["rows"].items():
        if not measured:
            continue
        cells = [name, " ".join(measured)]
        for field, factor, digits in (
            ("perplexity", 1, 4),
            ("loss", 100, 2),
            ("divergence", 1, 4),
            ("megabytes", 1, 2),
            ("seconds", 1, 0),
        ):
            values = factor * np.array([seed[field] for seed in measured.values()])
            spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 and field != "megabytes" else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Bars of loss and divergence by row, with the seeds' results as dots."""
    names = [name for name, measured in report["rows"].items() if measured]
    figure = Figure(figsize=(10, 1 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field, factor, label in zip(
        panels, ("loss", "divergence"), (100, 1), ("loss of perplexity (%)", "divergence (nats)"), strict=True
    ):
        for place, name in enumerate(names):
            values = factor * np.array([seed[field] for seed in report["rows"][name].values()])
            axes.barh(place, values.mean(), color="#0072B2")
            axes.plot(values, np.full(len(values), place), ".", color="#E69F00")
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
