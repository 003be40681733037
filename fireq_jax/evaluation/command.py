"""``fireq-evaluate``: perplexity of models on a text, and their divergence from the first, as a table and as JSON."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from fireq_jax.command_line import add_verbosity, exit_code, leave
from fireq_jax.compilation import keep_programs
from fireq_jax.evaluation.comparison import evaluate, format_table, resolve_models
from fireq_jax.evaluation.perplexity import check_windows
from fireq_jax.evaluation.plots import SmoothingEffect, plot_smoothing, read_smoothing, was_smoothed
from fireq_jax.json_files import write_json
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import KVFormat


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="fireq-evaluate", description=__doc__)
    parse.add_argument(
        "--model",
        dest="models",
        required=True,
        action="append",
        metavar="DIR_OR_ID",
        help="a model's folder or GGUF file, or a hub id to download; repeat it to compare several with the first",
    )
    parse.add_argument("--revision", help="branch, tag or commit of the models that are hub ids")
    parse.add_argument("--text", required=True, help="text file, .jsonl, .parquet, a folder of them, or a dataset name")
    parse.add_argument("--text-field", default="text", help="where .jsonl and .parquet hold their text (default: text)")
    parse.add_argument("--window", type=int, default=1024, help="tokens the model sees at once (default: 1024)")
    parse.add_argument(
        "--stride", type=int, help="tokens between the beginnings of windows; less than the window makes them overlap"
    )
    parse.add_argument("--max-windows", type=int, metavar="N", help="evaluate only the first N windows")
    parse.add_argument("--batch-size", type=int, default=4, help="windows computed together (default: 4)")
    parse.add_argument(
        "--no-divergence",
        dest="divergence",
        action="store_false",
        help="only perplexities, one model in memory at a time; divergence takes the first model beside each other one",
    )
    parse.add_argument("--kv-format", choices=get_args(KVFormat), help="overrides the models' cache format")
    parse.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of hidden states and unquantized weights (default: bfloat16)",
    )
    parse.add_argument(
        "--implementation", choices=get_args(Implementation), default="auto", help="of the ops (default: auto)"
    )
    parse.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="also draw channel maxima before and after smoothing, a folder a model",
    )
    parse.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parse.add_argument(
        "--no-verify", dest="verify", action="store_false", help="take converted models' files as they are"
    )
    add_verbosity(parse)
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    return exit_code("fireq-evaluate", lambda: run(args), args.log_level)


def run(args: argparse.Namespace) -> None:
    """Evaluate as the parsed command line says."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json is {args.json}; expected a file in a folder that exists")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json is {args.json}, a folder; expected a file")
    if args.plots is not None and args.plots.exists() and not args.plots.is_dir():
        raise ValueError(f"--plots is {args.plots}; expected a folder")
    check_windows(args.window, args.stride, args.batch_size, args.max_windows)
    names = [Path(model).resolve().name for model in args.models]
    if args.plots is not None and len(set(names)) < len(names):
        raise ValueError(f"--plots names a folder after each model's, and these are {names}; expected different ones")
    figures = {} if args.plots is None else _smoothing(args)
    keep_programs()
    results = evaluate(
        args.models,
        args.text,
        text_field=args.text_field,
        window=args.window,
        stride=args.stride,
        max_windows=args.max_windows,
        batch_size=args.batch_size,
        divergence=args.divergence,
        kv_format=args.kv_format,
        dtype=args.dtype,
        implementation=args.implementation,
        revision=args.revision,
        verify=args.verify,
    )
    print(format_table(results))
    print(f"\n{results[0].protocol}")
    for folder, effect in figures.items():
        print(f"{len(plot_smoothing(effect, folder))} figures in {folder}")
    if args.json is not None:
        write_json(args.json, {fields.pop("model"): fields for fields in map(dataclasses.asdict, results)})


def _smoothing(args: argparse.Namespace) -> dict[Path, SmoothingEffect]:
    """What to draw into which folder, of models that were smoothed; read before hours are spent on numbers."""
    figures = {
        args.plots / Path(name).resolve().name: read_smoothing(folder)
        for name, folder in resolve_models(args.models, args.revision).items()
        if was_smoothed(folder)
    }
    if not figures:
        raise ValueError(f"--plots has nothing to draw: none of {args.models} was smoothed when it was converted")
    return figures


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
