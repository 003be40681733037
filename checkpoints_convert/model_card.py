"""``README.md`` of a converted folder: what it is, for people and, in YAML before that, for the Hugging Face hub."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig
from fireq_jax.whole_files import write_whole

CARD = "README.md"
# What tells a card of ours from a user's.
_MARK = "<!-- written by fireq-convert -->"
_LICENSE = re.compile(r"(license(?:_name|_link)?):[ \t]+(\S[^\n]*)")
_MOST = 1 << 20  # characters of a card that are looked at


def write_card(output: Path, base: str | None, model: Path, config: ModelConfig, report: Mapping[str, Any]) -> None:
    """Write the card, but not over one that is somebody else's.

    Args:
        output: the converted folder.
        base: hub id of the model that was converted, if it came from there.
        model: its folder or file, whose own card says the license.
        config: the architecture.
        report: of the conversion.
    """
    path = output / CARD
    if path.is_symlink() or (path.exists() and _MARK not in _read(path)):
        return
    text = "\n".join([*_metadata(base, model, config, report), *_body(output.name, base, model, report)])
    write_whole(path, lambda file: file.write(f"{text}\n".encode(errors="replace")))


def license_of(model: Path) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` as a model's card has them, if it does."""
    path = model / CARD
    if not path.is_file():
        return {}
    start, *rest = re.split(r"^---[ \t]*$", _read(path), maxsplit=2, flags=re.MULTILINE)
    if start.strip() or len(rest) < 2:
        return {}
    lines = (_LICENSE.fullmatch(line.rstrip()) for line in rest[0].split("\n"))
    return {match[1]: match[2] for match in lines if match is not None}


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MOST)


def _metadata(base: str | None, model: Path, config: ModelConfig, report: Mapping[str, Any]) -> Iterator[str]:
    formats = sorted({weight["format"] for layer in report["layers"].values() for weight in layer["weights"].values()})
    yield "---"
    if base is not None:
        yield f"base_model: {json.dumps(base)}"
        yield "base_model_relation: quantized"
    yield "library_name: fireq-jax"
    yield "pipeline_tag: text-generation"
    yield from (f"{key}: {value}" for key, value in license_of(model).items())
    yield "tags:"
    yield from (f"- {tag}" for tag in dict.fromkeys(["fireq", "jax", "quantized", config.model_type, *formats]))
    yield "---"
    yield _MARK


def _body(name: str, base: str | None, model: Path, report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"# {name}", "")
    yield f"`{base or model.name}`, quantized by fireq-jax with the recipe `{Path(report['recipe']).name}`."
    yield from ("", "| | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in _facts(report))
    yield from ("", "## Use", "", "```python", "from fireq_jax import AutoModelForCausalLM", "")
    yield f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})  # this folder"
    yield from ("```", "", "```", f"fireq-generate --model {shlex.quote(name)} --prompt 'Once upon a time'", "```")
    yield from ("", "## Convert again", "", "With what is below in `recipe.json`:", "", "```")
    text = report["options"]["calibration"]
    windows = f" --calibration TEXT --calibration-samples {text[0]} --sequence-length {text[1]}" if text else ""
    command = f"fireq-convert --model {shlex.quote(base or model.name)} --output OUTPUT --recipe recipe.json"
    yield f"{command} --dtype {report['options']['dtype']}{windows}"
    yield from ("```", "", "```json", json.dumps(report["quantization"], indent=1), "```")
    yield from ("", "`report.json` says more: errors and sizes of each layer, time and memory of the conversion.")


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    quantization = QuantizationConfig.from_dict(report["quantization"])
    weights = f"{quantization.weight_format}, groups of {quantization.group_size}, {quantization.scale_dtype} scales"
    yield "weights", weights if quantization.weight_format not in ("fp8", "none") else quantization.weight_format
    if quantization.layer_formats:
        yield "but", ", ".join(f"`{pattern}` {chosen}" for pattern, chosen in quantization.layer_formats)
    if quantization.keep_float:
        yield "not quantized", ", ".join(f"`{pattern}`" for pattern in quantization.keep_float)
    dtype = report["options"]["dtype"]
    yield "activations", dtype if quantization.activation_format == "none" else quantization.activation_format
    yield "keys and values", dtype if quantization.kv_format == "none" else quantization.kv_format
    if quantization.layer_kv_formats:
        yield "but in", ", ".join(f"`{pattern}` {chosen}" for pattern, chosen in quantization.layer_kv_formats)
    yield "head", dtype if quantization.lm_head_format == "none" else quantization.lm_head_format
    yield "size", f"{report['bytes_after'] / 1e6:,.1f} MB, from {report['bytes_before'] / 1e6:,.1f} MB"
    if (held_out := report["held_out"]) is None:
        yield "loss", "not measured by the conversion"
        return
    losses = {name: "not finite" if loss is None else f"{loss:.3f}" for name, loss in held_out["perplexity"].items()}
    yield (
        f"perplexity on {held_out['tokens']} tokens of the calibration text that were held out",
        f"{losses['quantized']}; float {losses['float']}, round-to-nearest {losses['round_to_nearest']}",
    )
