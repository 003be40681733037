"""``fireq-convert``: a checkpoint of Llama or a relative in, a quantized model's folder out."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from checkpoints_convert.calibration_data import (
    Windows,
    calibration_windows,
    check_sizes,
    most_held_out,
    needs_calibration,
)
from checkpoints_convert.conversion import ConversionOptions, convert, dry_run
from checkpoints_convert.plan import Work, plan_of
from checkpoints_convert.work_folder import WorkFolder
from fireq_jax.checkpoints.folder import MANIFEST
from fireq_jax.checkpoints.hub import check_config, is_hub_id, resolve_config, resolve_model
from fireq_jax.checkpoints.reader import checkpoint_config
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import SOURCES, add_common_options, add_text_options, exit_code, leave
from fireq_jax.compilation import keep_programs
from fireq_jax.json_files import read_json
from fireq_jax.models.llama import linear_names
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig, weight_formats
from fireq_jax.text_data import Document, read_documents
from pallas_kernels import formats


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="fireq-convert",
        description="Quantize a checkpoint of Llama or a relative, block by block. Progress goes to stderr.",
        epilog=f"recipes:\n{recipes.described()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="Hugging Face folder, GGUF file, or a hub id to download",
    )
    parse.add_argument("--revision", help="branch, tag or commit of the hub id")
    parse.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parse.add_argument(
        "--recipe",
        default="fireq_plus",
        metavar="NAME_OR_FILE",
        help="one of those below, or FILE.json: fields of QuantizationConfig and a recipe to start from, as in "
        '{"base": "fireq_plus", "group_size": 64} (default: fireq_plus)',
    )
    parse.add_argument("--list-recipes", action=_ListRecipes, help="say which recipe is for what, and exit")
    _add_calibration(parse)
    parse.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="{bfloat16,float32}",
        help="of what stays unquantized (default: bfloat16)",
    )
    _add_overrides(parse)
    parse.add_argument(
        "--keep-codes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a quantized checkpoint, keep the codes that fit the recipe's weights (default: keep)",
    )
    parse.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and what it costs; writes nothing, and downloads no weights",
    )
    parse.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    add_common_options(parse, default=logging.INFO)
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    return exit_code("fireq-convert", lambda: run(args), args.log_level, args.device)


def run(args: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    quantization = _quantization(args)
    options = ConversionOptions(
        Path(args.model),
        args.output,
        args.recipe,
        quantization,
        args.dtype,
        args.batch_size,
        fit_cache=args.kv_format is None,
        keep_codes=args.keep_codes,
        base_model=args.model if is_hub_id(args.model) else None,
    )
    # What costs little comes first: text is read before weights are downloaded, and tokenized after.
    documents = _documents(args, quantization)
    if args.dry_run:
        print("\n".join(_plan(args, options, documents)))
        return
    model = resolve_model(args.model, args.revision, check=lambda folder: _check(folder, quantization))
    options = dataclasses.replace(options, model=model)
    tokens = held_out = None
    if documents is not None:
        tokens, held_out = _windows(args, documents, model)
    keep_programs()
    report = convert(options, tokens, held_out=held_out, resume=args.resume)
    before, after = report["bytes_before"] / 1e6, report["bytes_after"] / 1e6
    print(f"{args.output}: {before:.1f} MB -> {after:.1f} MB in {report['seconds']:.1f} s ({args.recipe})")


class _ListRecipes(argparse.Action):
    """Print what each recipe is, as ``--help`` prints the options: without what else the command needs."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(recipes.described())
        parser.exit()


def _add_calibration(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "--calibration",
        metavar="TEXT",
        help=f"text of the kinds that the model will meet: {SOURCES}; rtn, w4a16, w8a8_fp8 and none read none",
    )
    add_text_options(parse)
    parse.add_argument("--calibration-samples", type=int, default=128, metavar="N", help="token windows (default: 128)")
    parse.add_argument(
        "--sequence-length", type=int, default=1024, metavar="N", help="tokens of a window (default: 1024)"
    )
    parse.add_argument("--seed", type=int, default=0, help="chooses the windows (default: 0)")
    parse.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="windows that are calibrated on at once (default: 8)"
    )


def _add_overrides(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "--kv-format",
        choices=["int4", "fp8", "none"],
        help="overrides the recipe's cache format, and the choice among them where attention has biases",
    )
    parse.add_argument("--weight-format", choices=list(formats.CODEBOOKS), help="overrides a recipe's 4-bit weights")
    parse.add_argument("--lm-head-format", choices=["fp8", "none"], help="overrides the recipe's lm_head")
    parse.add_argument(
        "--keep-float",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="linear layers to leave alone, as in 'layers.0.*'",
    )
    for name, formats_there, example in (
        ("--layer-format", weight_formats(), "layers.29.mlp.down_proj=fp8"),
        ("--layer-kv-format", get_args(formats.KVFormat), "layers.3.self_attn=fp8"),
    ):
        what = "weights" if name == "--layer-format" else "cache"
        parse.add_argument(
            name,
            nargs="+",
            action="extend",
            default=[],
            metavar="PATTERN=FORMAT",
            help=f"{what} of some layers in another format ({', '.join(formats_there)}), as in {example!r}; of several "
            "patterns that match a layer the last decides",
        )


def _choices(option: str, texts: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Pairs of a pattern and a format, which the config checks."""
    for text in texts:
        if "=" not in text:
            raise ValueError(f"{option} is {text!r}; expected PATTERN=FORMAT")
    pairs = (text.rpartition("=") for text in texts)
    return tuple((pattern, chosen_format) for pattern, _, chosen_format in pairs)


def _quantization(args: argparse.Namespace) -> QuantizationConfig:
    """The recipe, and what the command line changes of it."""
    quantization = recipes.by_name_or_file(args.recipe)
    if args.kv_format is not None:
        quantization = quantization.with_kv_format(args.kv_format)
    if args.weight_format is not None:
        if quantization.weight_format not in formats.CODEBOOKS:
            raise ValueError(f"--weight-format {args.weight_format}: recipe {args.recipe!r} has no 4-bit weights")
        quantization = dataclasses.replace(quantization, weight_format=args.weight_format)
    if args.lm_head_format is not None:
        quantization = dataclasses.replace(quantization, lm_head_format=args.lm_head_format)
    return dataclasses.replace(
        quantization,
        keep_float=quantization.keep_float + tuple(args.keep_float),
        layer_formats=quantization.layer_formats + _choices("--layer-format", args.layer_format),
        layer_kv_formats=quantization.layer_kv_formats + _choices("--layer-kv-format", args.layer_kv_format),
    )


def _windows(args: argparse.Namespace, documents: list[Document], model: Path) -> tuple[Windows, Windows]:
    """Windows to calibrate on, and held-out ones."""
    return calibration_windows(
        documents,
        load_tokenizer(model),
        source=args.calibration,
        samples=args.calibration_samples,
        sequence_length=args.sequence_length,
        seed=args.seed,
    )


def _plan(args: argparse.Namespace, options: ConversionOptions, documents: list[Document] | None) -> list[str]:
    """What the conversion is going to do, of a hub id as far as its config files say."""
    samples, length = args.calibration_samples, args.sequence_length
    text = None if documents is None else (samples, length)
    WorkFolder(args.output).check(None, resume=args.resume)
    if not is_hub_id(args.model):
        model = resolve_model(args.model, args.revision, check=lambda folder: _check(folder, options.quantization))
        held_out = 0 if documents is None else len(_windows(args, documents, model)[1])
        return dry_run(dataclasses.replace(options, model=model), text, held_out)
    folder = resolve_config(args.model, args.revision, check=lambda folder: _check(folder, options.quantization))
    coded = "quantization_config" in read_json(folder / "config.json")
    kept = None if coded and args.keep_codes else ()
    config = checkpoint_config(folder)
    held_out = 0 if documents is None else most_held_out(samples, length)  # the tokenizer is not here to count
    sizes = {"batch_size": args.batch_size, "nbytes": None, "text": text, "held_out": held_out}
    return plan_of(Work(config, options.quantization, args.output, args.dtype, **sizes, kept=kept))


def _documents(args: argparse.Namespace, quantization: QuantizationConfig) -> list[Document] | None:
    """The calibration text; None for a recipe that measures nothing on text."""
    if not needs_calibration(quantization):
        if args.calibration is not None:
            logging.getLogger(__name__).warning("recipe %r reads no text; --calibration is not looked at", args.recipe)
        return None
    if args.calibration is None:
        raise ValueError(f"recipe {args.recipe!r} needs --calibration TEXT")
    check_sizes(samples=args.calibration_samples, sequence_length=args.sequence_length, seed=args.seed)
    return read_documents(args.calibration, text_field=args.text_field, join=args.join)


def _check(folder: Path, quantization: QuantizationConfig) -> None:
    """Raise ValueError for a model that cannot be converted so, by its config files."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is a converted model already; expected a Hugging Face checkpoint")
    check_config(folder)
    config = checkpoint_config(folder)
    quantization.check_fits(linear_names(config), config.head_dim)


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
