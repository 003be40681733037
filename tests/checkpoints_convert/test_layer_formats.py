"""Layers of one model in different formats: converted, saved, run, reported and exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import TINY_LLAMA, write_checkpoint

from checkpoints_convert.conversion import ConversionOptions, convert
from checkpoints_convert.convert_and_quantize import main
from checkpoints_convert.export import ExportOptions, export
from fireq_jax import AutoModelForCausalLM, recipes
from fireq_jax.models.kv_cache import slot_bytes
from fireq_jax.models.parameters import parameters_of

WORST = "layers.1.mlp.down_proj"
IDS = jnp.arange(24)[None] % 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one layer's groups have outliers, which INT4 takes badly."""
    weight = np.random.default_rng(3).standard_t(2, (64, 128)).astype(np.float32) / 4
    folder = tmp_path_factory.mktemp("source") / "model"
    return write_checkpoint(folder, TINY_LLAMA, 0.1, **{f"model.{WORST}.weight": weight})


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Reports of conversions with all layers in one format, and with the worst layer and a cache in FP8."""
    int4 = dataclasses.replace(recipes.rtn(), scale_dtype="bf16", channel_scale="per_tensor_pow2")
    mixed = dataclasses.replace(int4, layer_formats={WORST: "fp8"}, layer_kv_formats={"layers.1.*": "fp8"})
    reports = {}
    for name, recipe in (("int4", int4), ("mixed", mixed)):
        folder = tmp_path_factory.mktemp("converted") / name
        options = ConversionOptions(source, folder, name, recipe, "float32")
        reports[name] = convert(options, None, progress=False) | {"folder": folder}
    return reports


def test_the_worst_layer_in_fp8_makes_the_model_better(source: Path, converted: dict[str, dict[str, Any]]) -> None:
    exact = AutoModelForCausalLM.from_pretrained(source, dtype="float32")(IDS)

    def error(name: str) -> float:
        logits = AutoModelForCausalLM.from_pretrained(converted[name]["folder"], dtype="float32")(IDS)
        return float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))

    assert error("mixed") < 0.95 * error("int4")


def test_the_report_has_each_layers_format_and_size(converted: dict[str, dict[str, Any]]) -> None:
    sizes = {name: report["layers"]["layers.1"]["weights"] for name, report in converted.items()}
    assert sizes["mixed"]["mlp.down_proj"] == {"format": "fp8", "bytes": 64 * 128 + 4 * 64}
    assert sizes["int4"]["mlp.down_proj"]["format"] == sizes["mixed"]["mlp.gate_up_proj"]["format"] == "int4"
    errors = {name: report["layers"]["layers.1"]["weight_error"]["mlp.down_proj"] for name, report in converted.items()}
    assert errors["mixed"] < 0.04 < errors["int4"]
    folder = converted["mixed"]["folder"]
    assert json.loads((folder / "report.json").read_text())["quantization"]["layer_formats"] == [[WORST, "fp8"]]


def test_it_runs_with_a_cache_of_two_formats(converted: dict[str, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted["mixed"]["folder"], dtype="float32")
    assert parameters_of(model)[f"{WORST}.weight"].format == "fp8"
    _, cache = jax.eval_shape(lambda ids: model.prefill(ids, jnp.array([24]), capacity=32), IDS)
    assert [layer.key.format for layer in cache.layers] == ["int4", "fp8"]
    # 2 heads of 16 channels, keys and values: in 4 bits with bf16 scales, in 8 with float32 ones.
    assert slot_bytes(model.config, model.quantization, model.dtype) == 2 * 2 * (8 + 2) + 2 * 2 * (16 + 4)
    one = AutoModelForCausalLM.from_pretrained(converted["mixed"]["folder"], dtype="float32", kv_format="none")
    assert one.quantization.layer_kv_formats == ()


def test_it_is_exported_in_two_forms_and_read_back_with_the_same_codes(
    converted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted["mixed"]["folder"], dtype="float32", kv_format="none")
    export(
        ExportOptions(converted["mixed"]["folder"], tmp_path / "out", "compressed-tensors", "float32"), progress=False
    )
    described = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert described["format"] == "mixed-precision"
    groups = {group["format"]: group["targets"] for group in described["config_groups"].values()}
    assert groups["float-quantized"] == [f"model.{WORST}"]
    assert len(groups["pack-quantized"]) == 2 * 7 - 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert again.quantization.weight_format_of(WORST) == "fp8"
    assert not any(again.quantization.keeps_float(f"layers.{i}.mlp.gate_up_proj") for i in range(2))
    for index, layer in enumerate(again.layers):
        ours, theirs = (each.mlp.down_proj.weight.get_value().dequantize() for each in (model.layers[index], layer))
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer-format", "layers.1.mlp.up_proj=fp8"], "matches layers.1.mlp.up_proj alone"),
        (["--layer-format", "layers.1.*"], "--layer-format is 'layers.1.*'; expected PATTERN=FORMAT"),
        (["--layer-format", "layers.1.*=int5"], "layer_formats of 'layers.1.*' is 'int5'"),
        (["--layer-kv-format", "layers.7.*=fp8"], "layer_kv_formats pattern 'layers.7.*' matches no layer"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--model", str(source), "--output", str(tmp_path / "out"), "--recipe", "rtn", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
