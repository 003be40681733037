"""``fireq-evaluate``: perplexity of models on a text, and their divergence from the first, as a table and as JSON."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import numpy as np

from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.command_line import SOURCES, add_common_options, add_text_options, exit_code, leave
from fireq_jax.compilation import keep_programs
from fireq_jax.evaluation.activations import ActivationStatistics, measure_activations
from fireq_jax.evaluation.comparison import Evaluation, evaluate, format_table, resolve_models
from fireq_jax.evaluation.perplexity import check_windows
from fireq_jax.evaluation.plots import save_figures, subject_of
from fireq_jax.evaluation.report import write_report
from fireq_jax.evaluation.smoothing_effect import read_smoothing, was_smoothed
from fireq_jax.json_files import write_json
from fireq_jax.models import CausalLM
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import KVFormat

_WINDOWS_LOOKED_AT = 4  # windows of text for the figures, at most


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="fireq-evaluate",
        description="Perplexity of models on a text. Of each but the first also: loss, by how much its perplexity is "
        "above the first's; KL, the divergence of its next tokens from the first's, in nats; top-1, the share of "
        "tokens of which both think the same likeliest.",
    )
    parse.add_argument(
        "--model",
        dest="models",
        required=True,
        action="append",
        metavar="DIR_OR_ID",
        help="a model's folder or GGUF file, or a hub id to download; repeat it to compare several with the first",
    )
    parse.add_argument("--revision", help="branch, tag or commit of the models that are hub ids")
    parse.add_argument("--text", required=True, help=SOURCES)
    add_text_options(parse)
    parse.add_argument(
        "--window", type=int, default=1024, metavar="N", help="tokens the model sees at once (default: 1024)"
    )
    parse.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the beginnings of windows; less than the window makes them overlap (default: the window)",
    )
    parse.add_argument("--max-windows", type=int, metavar="N", help="evaluate only the first N windows")
    parse.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows computed together (default: 4)")
    parse.add_argument(
        "--no-divergence",
        dest="divergence",
        action="store_false",
        help="only perplexities, one model in memory at a time; divergence takes the first model beside each other one",
    )
    parse.add_argument("--kv-format", choices=get_args(KVFormat), help="overrides the models' cache format")
    parse.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of hidden states and unquantized weights (default: bfloat16)",
    )
    parse.add_argument(
        "--implementation", choices=get_args(Implementation), default="auto", help="of the ops (default: auto)"
    )
    _add_outputs(parse)
    parse.add_argument(
        "--no-verify", dest="verify", action="store_false", help="take converted models' files as they are"
    )
    add_common_options(parse)
    return parse


def _add_outputs(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parse.add_argument(
        "--report", type=Path, metavar="FILE.html", help="also write a page with the results and figures of all layers"
    )
    parse.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="also draw an overview of each model's activations, in a folder of its own in DIR",
    )
    parse.add_argument(
        "--plot-layers",
        nargs="+",
        metavar="N",
        help="draw a page of each of these layers, or of 'all' (default: none in --plots, all in --report)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    args.command = ["fireq-evaluate", *(sys.argv[1:] if arguments is None else arguments)]
    return exit_code("fireq-evaluate", lambda: run(args), args.log_level, args.device)


def run(args: argparse.Namespace) -> None:
    """Evaluate as the parsed command line says."""
    for option in ("json", "report"):
        if (path := getattr(args, option)) is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{option} is {path}; expected a file in a folder that exists")
        if path is not None and path.is_dir():
            raise ValueError(f"--{option} is {path}, a folder; expected a file")
    if args.json is not None and args.report is not None and args.json.resolve() == args.report.resolve():
        raise ValueError(f"--json and --report are both {args.report}; expected two files")
    if args.plots is not None and args.plots.exists() and not args.plots.is_dir():
        raise ValueError(f"--plots is {args.plots}; expected a folder")
    check_windows(args.window, args.stride, args.batch_size, args.max_windows)
    names = [Path(model).resolve().name for model in args.models]
    if args.plots is not None and len(set(names)) < len(names):
        raise ValueError(f"--plots names a folder after each model's, and these are {names}; expected different ones")
    draws = args.plots is not None or args.report is not None
    layers = _layers(args, draws=draws)
    keep_programs()
    statistics: dict[str, ActivationStatistics] = {}
    results = evaluate(
        args.models,
        args.text,
        text_field=args.text_field,
        join=args.join,
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
        visit=functools.partial(_measure, statistics, args) if draws else None,
    )
    print(format_table(results))
    print(f"\n{results[0].protocol}")
    if args.json is not None:
        write_json(args.json, {fields.pop("model"): fields for fields in map(dataclasses.asdict, results)})
    if draws:
        _draw(args, results, statistics, layers)


def _layers(args: argparse.Namespace, *, draws: bool) -> list[int] | None:
    """Whose pages are to be drawn, None for all; what figures are made of is read before hours are spent on numbers."""
    if not draws:
        if args.plot_layers is not None:
            raise ValueError(f"--plot-layers is {args.plot_layers}, and nothing is drawn; expected --plots or --report")
        return None
    folders = resolve_models(args.models, args.revision).values()
    for folder in folders:
        if was_smoothed(folder):
            read_smoothing(folder)
    if args.plot_layers is None or args.plot_layers == ["all"]:
        return None
    least = min(StoredModel.open(folder, verify=False).config.num_layers for folder in folders)
    if wrong := [layer for layer in args.plot_layers if not (layer.isdecimal() and int(layer) < least)]:
        raise ValueError(f"--plot-layers is {wrong[0]!r}; expected 'all' or numbers from 0 to {least - 1}")
    return list(map(int, args.plot_layers))


def _measure(
    statistics: dict[str, ActivationStatistics],
    args: argparse.Namespace,
    name: str,
    model: CausalLM,
    tokens: np.ndarray,
) -> None:
    """Add a model's activations on the first windows."""
    window = min(args.window, len(tokens))
    count = min(_WINDOWS_LOOKED_AT, args.max_windows or _WINDOWS_LOOKED_AT, len(tokens) // window)
    windows = tokens[: count * window].reshape(count, window)
    statistics[name] = measure_activations(model, windows, description=f"{name}, activations")


def _draw(
    args: argparse.Namespace,
    results: Sequence[Evaluation],
    statistics: dict[str, ActivationStatistics],
    layers: list[int] | None,
) -> None:
    folders = resolve_models(args.models, args.revision)
    first = next(iter(statistics.items()))
    subjects = {
        name: subject_of(name, folders[name], found, None if name == first[0] else first)
        for name, found in statistics.items()
    }
    if args.plots is not None:
        for name, subject in subjects.items():
            folder = args.plots / Path(name).resolve().name
            pages = range(subject.num_layers) if args.plot_layers == ["all"] else layers or ()
            print(f"{len(save_figures(subject, folder, pages))} figures in {folder}")
    if args.report is not None:
        write_report(args.report, results, subjects, command=args.command, layers=layers)
        print(f"report in {args.report}")


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
