"""``fireq-export``: a converted model in, a Hugging Face folder for other engines out."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from checkpoints_convert.export import Dtype, ExportFormat, ExportOptions, export
from fireq_jax.checkpoints.hub import resolve_model
from fireq_jax.command_line import add_common_options, exit_code, leave

_DESCRIPTION = """\
Write a model that fireq-convert made as a Hugging Face folder, which vLLM, SGLang and transformers read.

  compressed-tensors  the same 4-bit or 8-bit weights; with FP8 activations where the recipe has them
  huggingface         plain floats: larger, and readable by everything

The log says what is written, and what of the model the folder cannot hold."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="fireq-export", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="folder that fireq-convert wrote, or a hub id of one"
    )
    parse.add_argument("--revision", help="branch, tag or commit of the hub id")
    parse.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to make; must not hold anything yet"
    )
    parse.add_argument("--format", required=True, choices=get_args(ExportFormat), help="what the folder holds")
    parse.add_argument(
        "--dtype", default="bfloat16", choices=get_args(Dtype), help="of what is not quantized (default: bfloat16)"
    )
    parse.add_argument("--no-verify", action="store_true", help="take changed files of the model as they are")
    add_common_options(parse, default=logging.INFO)
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    args = parser().parse_args(arguments)
    return exit_code("fireq-export", lambda: run(args), args.log_level, args.device)


def run(args: argparse.Namespace) -> None:
    """Export as the parsed command line says."""
    model = resolve_model(args.model, args.revision)
    size = export(ExportOptions(model, args.output, args.format, args.dtype, not args.no_verify))
    print(f"{args.output}: {size / 1e6:.1f} MB ({args.format})")


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
