"""Converting checkpoints that were quantized before: codes are kept bit by bit, or made anew, as the report says."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
import quantized_files as files
from small_checkpoint import block_of
from tiny_llama import config_of, weights_of

from checkpoints_convert.algorithms.smoothing import leaving, smooth_block
from checkpoints_convert.calibrate import Calibrator
from checkpoints_convert.conversion import ConversionOptions, convert
from checkpoints_convert.convert_and_quantize import main
from checkpoints_convert.stored_codes import report_codes
from fireq_jax import AutoModelForCausalLM, ModelConfig, recipes
from fireq_jax.checkpoints.folder import read_manifest
from fireq_jax.checkpoints.reader import open_checkpoint
from fireq_jax.models.block import fuse_block
from fireq_jax.models.coded_weight import CodedWeight
from fireq_jax.models.parameters import parameters_of
from pallas_kernels.quantized_tensor import QuantizedTensor

FIELDS = config_of(
    "gqa", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
TENSORS = weights_of(FIELDS)
LINEARS = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
TEXT = np.random.default_rng(0).integers(0, FIELDS["vocab_size"], (4, 24), dtype=np.int32)


def converted(source, output, quantization, tokens=None, **options):
    options = ConversionOptions(source, output, "test", quantization, dtype="float32", batch_size=4, **options)
    report = convert(options, tokens, progress=False)
    return report, AutoModelForCausalLM.from_pretrained(output, dtype=jnp.float32)


def quantized(folder, group=128, ignore=(), **options):
    said = files.compressed_config("pack-quantized", group=group, symmetric=not options.get("asym", False))
    return files.write_quantized(folder, FIELDS, TENSORS, files.compressed_int(group, **options), said, ignore=ignore)[
        0
    ]


def stored_codes(source, index, name):
    """Fused codes and scales as the reader has them."""
    return fuse_block(open_checkpoint(source).block(index))[f"{name}.weight"]


def assert_same_codes(source, model, names=LINEARS):
    found = parameters_of(model)
    for index in range(2):
        for name in names:
            weight = found[f"layers.{index}.{name}.weight"]
            assert isinstance(weight, QuantizedTensor)
            codes = np.clip(stored_codes(source, index, name).values, -7, 7)
            np.testing.assert_array_equal(weight.codes().codes, codes)


@pytest.mark.parametrize("recipe", ["rtn", "fireq", "fireq_plus", "fireq_bf16_scales"])
def test_recipes_keep_codes_bit_by_bit(tmp_path, recipe):
    source = quantized(tmp_path, low=-8)
    report, model = converted(source, tmp_path / "out", recipes.by_name(recipe), TEXT)
    assert_same_codes(source, model)
    limit = 0.05 if recipes.by_name(recipe).scale_dtype == "e4m3" else 0.02
    for layer in report["layers"].values():
        assert layer["codes"]["kept"] == LINEARS
        assert layer["codes"]["quantized_anew"] == []
        assert layer["codes"]["clipped"] > 0
        assert all(0 < error < limit for error in layer["weight_error"].values())


def test_bf16_scales_and_scales_of_channels_lose_nothing(tmp_path):
    exact = dataclasses.replace(recipes.rtn(), scale_dtype="bf16")
    for name, group, quantization in (("group", 64, exact), ("channel", None, recipes.rtn())):
        source = quantized(tmp_path / name, group)
        report, model = converted(source, tmp_path / name / "out", quantization)
        assert all(error < 1e-6 for layer in report["layers"].values() for error in layer["weight_error"].values())
        assert_same_codes(source, model)
        assert model.quantization.group_size == (64 if group == 64 else 128)


def test_scales_of_kept_codes_are_relative_to_the_largest_of_the_channel(tmp_path):
    source = quantized(tmp_path)
    _, model = converted(source, tmp_path / "out", recipes.rtn())
    found = parameters_of(model)["layers.1.mlp.down_proj.weight"].codes()
    scale = stored_codes(source, 1, "mlp.down_proj").group_scale
    np.testing.assert_allclose(found.channel_scale, scale.max(axis=1) / 64, rtol=1e-6)
    np.testing.assert_array_equal(
        found.group_scale.astype(np.float32), (scale / found.channel_scale[:, None]).astype(files.E4M3)
    )


def test_zero_points_are_kept_with_a_clip(tmp_path, caplog):
    source = quantized(tmp_path, asym=True)
    with caplog.at_level(logging.INFO):
        report, model = converted(source, tmp_path / "out", recipes.rtn())
    first = report["layers"]["layers.0"]
    assert f"mlp.down_proj keeps its codes (error {first['weight_error']['mlp.down_proj']:.2%})" in caplog.text
    assert f"{first['codes']['clipped']} codes clipped" in caplog.text
    assert_same_codes(source, model)
    assert all(0.01 < error < 0.1 for layer in report["layers"].values() for error in layer["weight_error"].values())
    assert all(layer["codes"]["clipped"] > 0 for layer in report["layers"].values())
    assert "--no-keep-codes" not in caplog.text


def test_many_clipped_codes_are_a_warning(caplog):
    codes = {"mlp.down_proj.weight": CodedWeight(np.full((2, 64), 9, np.int8), None, np.ones(2, np.float32), "int4")}
    report_codes({"mlp.down_proj": 0.2}, 0, ["layers.0.mlp.down_proj"], codes)
    assert "100% of the stored codes are outside -7..7 and clipped; --no-keep-codes" in caplog.text


def test_fp8_is_kept_by_a_recipe_of_fp8(tmp_path):
    said = files.compressed_config("float-quantized", num_bits=8, kind="float", strategy="channel")
    source, _ = files.write_quantized(tmp_path, FIELDS, TENSORS, files.fp8(1, None), said)
    report, model = converted(source, tmp_path / "out", recipes.w8a8_fp8())
    assert all(error == 0 for layer in report["layers"].values() for error in layer["weight_error"].values())
    stored = stored_codes(source, 0, "self_attn.qkv_proj")
    np.testing.assert_array_equal(parameters_of(model)["layers.0.self_attn.qkv_proj.weight"].values, stored.values)


@pytest.mark.parametrize("keep", [True, False])
def test_what_does_not_fit_is_quantized_from_its_floats(tmp_path, keep, caplog):
    """As if the checkpoint had held these: groups of 32 never fit, others not if nobody wants them."""
    group = 32 if keep else 128
    source = quantized(tmp_path, group)
    with caplog.at_level(logging.INFO):
        report, model = converted(source, tmp_path / "out", recipes.rtn(), keep_codes=keep)
    assert "0 of 8 linear layers keep their codes" in caplog.text
    assert "8 are quantized anew" in caplog.text
    _, expected = converted(tmp_path / "float", tmp_path / "out2", recipes.rtn())
    assert report["layers"]["layers.1"]["codes"] == {"kept": [], "quantized_anew": LINEARS, "clipped": 0}
    for weight, other in zip(*(parameters_of(each).values() for each in (model, expected)), strict=True):
        if isinstance(weight, QuantizedTensor):
            weight, other = weight.values, other.values
        np.testing.assert_array_equal(weight, other)


def test_layers_beside_kept_ones_go_through_the_recipe(tmp_path):
    source = quantized(tmp_path, ignore=("down_proj",))
    report, model = converted(source, tmp_path / "out", recipes.fireq().with_kv_format("none"), TEXT)
    assert_same_codes(source, model, LINEARS[1:])
    assert all(layer["codes"]["quantized_anew"] == ["mlp.down_proj"] for layer in report["layers"].values())
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=jnp.float32)
    ids = jnp.asarray(TEXT[:1])
    assert jnp.linalg.norm(model(ids) - exact(ids)) < 0.25 * jnp.linalg.norm(exact(ids))


CONFIG = ModelConfig(
    vocab_size=8, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.mark.parametrize("recipe", ["fireq", "fireq_plus"])
@pytest.mark.parametrize("names", [[name] for name in LINEARS] + [LINEARS])
def test_smoothing_leaves_kept_layers_alone(recipe, names):
    smoothing = recipes.by_name(recipe).smoothing
    assert leaving(smoothing, [], CONFIG) == smoothing
    smoothing = dataclasses.replace(leaving(smoothing, names, CONFIG), post_rope_channels=0)
    block = block_of(CONFIG)
    hidden = np.random.default_rng(0).standard_normal((2, 16, CONFIG.hidden_size)).astype(np.float32)
    calibrator = Calibrator(CONFIG, 2)
    output, statistics = calibrator.run(block, 0, hidden)
    inputs = {name: channels.mean_abs for name, channels in statistics.inputs.items()}
    smoothed = smooth_block(block, statistics.keys, CONFIG, smoothing, inputs, statistics.values)
    fused, before = fuse_block(smoothed), fuse_block(block)
    changed = {name for name in LINEARS if not np.array_equal(fused[f"{name}.weight"], before[f"{name}.weight"])}
    assert changed.isdisjoint(names)
    assert changed or names == LINEARS
    smoothed.pop("self_attn.key_offset", None)
    np.testing.assert_allclose(calibrator.run(smoothed, 0, hidden)[0], output, rtol=1e-3, atol=1e-3)


def test_norms_of_heads_take_what_kept_rows_cannot():
    fireq, normed = recipes.fireq().smoothing, dataclasses.replace(CONFIG, head_norm="before_rope")
    assert leaving(fireq, ["self_attn.qkv_proj"], normed).pre_rope
    assert not leaving(fireq, ["self_attn.qkv_proj"], CONFIG).pre_rope
    parallel = dataclasses.replace(CONFIG, norm_order="parallel")
    assert not leaving(fireq, ["mlp.gate_up_proj"], parallel).qkv_input


def test_command_line(tmp_path, capsys):
    source = quantized(tmp_path)
    for flag, kept in (("--keep-codes", LINEARS), ("--no-keep-codes", [])):
        output = tmp_path / flag
        assert main(["--model", str(source), "--output", str(output), "--recipe", "rtn", flag]) == 0
        report = json.loads((output / "report.json").read_text())
        assert report["layers"]["layers.0"]["codes"]["kept"] == kept
        assert report["options"]["keep_codes"] == (flag == "--keep-codes")
    assert read_manifest(output).quantization == recipes.rtn()


def test_a_damaged_checkpoint_leaves_nothing_behind(tmp_path):
    source, _ = files.write_quantized(
        tmp_path, FIELDS, TENSORS, files.gptq(), files.gptq_config(checkpoint_format="gptq_v2")
    )
    with pytest.raises(ValueError, match=r"zero point of 7; expected 8 .*checkpoint_format"):
        converted(source, tmp_path / "out", recipes.rtn())
    assert not (tmp_path / "out").exists()
