"""Exported folders: the same codes and the same function for others, or nothing at all."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import family_fields, family_tokens
from tiny_llama import CASES, config_of, weights_of, write_folder

from checkpoints_convert import export as export_module
from checkpoints_convert.algorithms.keys import PairTransform, fold_pairs
from checkpoints_convert.export import ExportFormat, ExportOptions, export
from checkpoints_convert.export_command import main
from checkpoints_convert.huggingface_config import huggingface_fields
from checkpoints_convert.rotated_checkpoint import RotatedCheckpoint
from fireq_jax import AutoModelForCausalLM, recipes
from fireq_jax.checkpoints.folder import StoredModel, save_model
from fireq_jax.checkpoints.reader import CheckpointReader, open_checkpoint
from fireq_jax.checkpoints.safetensors_writer import shards_of
from fireq_jax.checkpoints.tensor_files import tensors_in
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.block import split_block
from fireq_jax.models.coded_weight import CodedWeight, as_float
from fireq_jax.models.parameters import global_parameters, layer_parameters, parameters_of
from fireq_jax.quantization.config import QuantizationConfig, SmoothingConfig
from pallas_kernels.quantized_tensor import QuantizedTensor

BF16_SCALES = dataclasses.replace(recipes.w4a16(), scale_dtype="bf16", channel_scale="per_tensor_pow2")
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
ROUNDING = 1e-5  # of the largest logit, float32
NEW = 4  # tokens of greedy text
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_LIBRARY = importlib.util.find_spec("compressed_tensors") is not None


def saved(
    folder: Path, fields: Mapping[str, Any], quantization: QuantizationConfig, online: Mapping[str, Any] | None = None,
    *, rotated: bool = False,
) -> Path:  # fmt: skip
    """A converted model without calibration: a tiny checkpoint's tensors, rounded; ``online`` are of every layer."""
    source: CheckpointReader = open_checkpoint(write_folder(folder / "source", fields))
    if rotated:
        source = RotatedCheckpoint(source, quantization)
    parameters = global_parameters(
        {name: source.global_tensor(name) for name in source.global_names()}, quantization, "float32"
    )
    for index in range(source.config.num_layers):
        block = source.block(index) | dict(online or {})
        parameters |= layer_parameters(block, index, quantization, "float32")
    save_model(folder / "model", source.config, quantization, parameters)
    shutil.copyfile(folder / "source/config.json", folder / "model/config.json")
    return folder / "model"


def exported(model: Path, form: ExportFormat, dtype: Any = "float32") -> Path:
    output = model.with_name(form)
    export(ExportOptions(model, output, form, dtype), progress=False)
    return output


def read(folder: Path, **options: Any) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=jnp.float32, **options)


def assert_same_function(folder: Path, model: AutoModelForCausalLM, *, ours: bool = False) -> None:
    """Logits and greedy text: of transformers, where it is installed, and of our own reader else or if asked for."""
    tokens, other = family_tokens(length=20), None
    described = json.loads((folder / "config.json").read_text())
    if HAS_TORCH and (HAS_LIBRARY or "quantization_config" not in described):
        import torch
        from transformers import AutoModelForCausalLM as Reference

        reference = Reference.from_pretrained(folder, dtype=torch.float32)
        for _ in range(NEW):
            with torch.no_grad():
                other = reference(torch.from_numpy(tokens).long()).logits.numpy()
            tokens = np.concatenate([tokens, other[:, -1:].argmax(-1).astype(np.int32)], axis=1)
    logits = np.asarray(model(tokens))
    bound = ROUNDING * np.abs(logits).max()
    if other is not None:
        np.testing.assert_allclose(other, logits[:, :-1], rtol=0, atol=bound)
        np.testing.assert_array_equal(logits[:, -NEW - 1 : -1].argmax(-1), tokens[:, -NEW:])
    if ours or other is None:
        np.testing.assert_allclose(read(folder)(tokens), logits, rtol=0, atol=bound)


def assert_same_weights(folder: Path, model: Path) -> None:
    """Bit for bit, floats and what codes stand for, of the only layer and outside."""
    reader, dequantize = open_checkpoint(folder), jax.jit(QuantizedTensor.dequantize)
    mine = {
        name.removeprefix("layers.0."): np.asarray(dequantize(value) if isinstance(value, QuantizedTensor) else value)
        for name, value in parameters_of(read(model)).items()
    }
    theirs = reader.block(0) | {name: reader.global_tensor(name) for name in reader.global_names()}
    mine = split_block(mine, reader.config)
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        np.testing.assert_array_equal(as_float(theirs[name]), value)


def codes_of(folder: Path) -> dict[str, CodedWeight]:
    """Codes of a converted model by a block's names, of its only layer."""
    stored = StoredModel.open(folder)
    model = parameters_of(read(folder))
    fused = {
        name.removeprefix("layers.0."): CodedWeight.unpack(value)
        for name, value in model.items()
        if isinstance(value, QuantizedTensor) and name.startswith("layers.0.")
    }
    return {name: value for name, value in split_block(fused, stored.config).items() if isinstance(value, CodedWeight)}


# --- codes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int4_with_bf16_scales_is_exact_for_all_who_read_it(tmp_path: Path) -> None:
    model = saved(tmp_path, family_fields("llama", **WIDE), BF16_SCALES)
    folder = exported(model, "compressed-tensors")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert_same_function(folder, read(model), ours=True)


@pytest.mark.parametrize("recipe", [BF16_SCALES, recipes.rtn(), recipes.w8a8_fp8()], ids=["bf16", "e4m3", "fp8"])
def test_compressed_tensors_decompresses_to_the_same_weights(recipe: QuantizationConfig, tmp_path: Path) -> None:
    """Bit for bit: codes times float32 scales; what the kernels multiply by where scales are not E4M3."""
    pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    model = saved(tmp_path, family_fields("qwen2", **WIDE), recipe)
    folder = exported(model, "compressed-tensors")
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = library.quantization.QuantizationConfig.model_validate(fields)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    for ours, codes in codes_of(model).items():
        stem = f"model.layers.0.{ours.removesuffix('weight')}"
        parts = {name.removeprefix(stem): tensor for name, tensor in stored.items() if name.startswith(stem)}
        found = compressor.decompress(parts, config.config_groups["group_0"])["weight"].numpy()
        if codes.group_scale is None:
            np.testing.assert_array_equal(found, codes.dequantize())
            continue
        scale = (codes.group_scale * codes.channel_scale[:, None]).repeat(128, axis=1)[:, : found.shape[1]]
        np.testing.assert_array_equal(found, codes.values * scale)
        if recipe is BF16_SCALES:
            np.testing.assert_array_equal(found, codes.dequantize())


@pytest.mark.parametrize("case", ["phi3", "mixtral"])
def test_other_families_codes_come_back(case: str, tmp_path: Path) -> None:
    """Fused again, and of each expert."""
    model = saved(tmp_path, family_fields(case, **WIDE), recipes.rtn())
    folder = exported(model, "compressed-tensors")
    reader = open_checkpoint(folder)
    block, expected = reader.block(0), codes_of(model)
    assert {kind.fp8_rows for kind in reader.coded.values()} == {True}
    assert set(expected) == {name for name, tensor in block.items() if isinstance(tensor, CodedWeight)}
    for name, codes in expected.items():
        found = block[name]
        assert isinstance(found, CodedWeight)
        np.testing.assert_array_equal(found.values, codes.values)
        np.testing.assert_allclose(found.dequantize(), codes.dequantize(), rtol=1e-6)


def test_layers_that_cannot_be_codes_stay_floats(tmp_path: Path) -> None:
    """Those that the recipe left alone, and o_proj of padded heads, whose channels move from group to group."""
    recipe = dataclasses.replace(BF16_SCALES, keep_float=("*.down_proj",))
    model = saved(tmp_path, family_fields("llama padded", **WIDE), recipe)
    folder = exported(model, "compressed-tensors")
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.0.{name}_proj" for name in ("self_attn.o", "mlp.down"))]
    assert_same_weights(folder, model)


# --- floats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_what_runs_online_can_be_left_out(case: str, tmp_path: Path) -> None:
    """S, the offset of keys, and N in the norms of heads change no logits."""
    smoothing = SmoothingConfig(post_rope_channels=4, key_offset=True)
    quantization = dataclasses.replace(recipes.none(), smoothing=smoothing)
    fields = family_fields(case, num_hidden_layers=1)
    config = config_from_huggingface(fields)
    shape = config.num_kv_heads, config.head_dim
    rng = np.random.default_rng(0)
    online = {
        "self_attn.post_rope_scale": rng.uniform(0.5, 2, shape).astype(np.float32),
        "self_attn.key_offset": rng.normal(0, 3, shape).astype(np.float32),
    }
    if case == "qwen3":
        gains = {
            name: np.broadcast_to(weights_of(fields)[f"model.layers.0.{name}.weight"], (heads, config.head_dim))
            for name, heads in (("self_attn.q_norm", config.num_heads), ("self_attn.k_norm", config.num_kv_heads))
        }
        n = PairTransform(jnp.asarray(rng.uniform(0.2, 5, (config.num_kv_heads, config.head_dim // 2)), jnp.float32))
        online |= {name: np.asarray(gain) for name, gain in fold_pairs(gains, n, config).items()}
    model = saved(tmp_path, fields, quantization, online)
    assert_same_function(exported(model, "huggingface"), read(model))


def test_a_tied_head_in_a_rotated_stream_becomes_a_matrix(tmp_path: Path) -> None:
    quantization = dataclasses.replace(recipes.none(), smoothing=SmoothingConfig(
        residual_basis="hadamard", pre_rope=False, post_rope_channels=0
    ))  # fmt: skip
    fields = family_fields("llama", num_hidden_layers=1, tie_word_embeddings=True)
    model = saved(tmp_path, fields, quantization, rotated=True)
    folder = exported(model, "huggingface")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_function(folder, read(model))


def test_floats_of_codes_are_those_that_the_kernels_multiply_by(tmp_path: Path) -> None:
    """Codes times E4M3 scales rounded to E4M3, an FP8 head; in several files."""
    recipe = dataclasses.replace(recipes.rtn(), lm_head_format="fp8")
    model = saved(tmp_path, family_fields("llama", **WIDE), recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "shards_of", functools.partial(shards_of, largest=100_000))
        folder = exported(model, "huggingface")
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) > 2
    assert_same_weights(folder, model)


# --- config.json and companions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *(config_of(case) for case in CASES),
        *map(family_fields, ("mistral", "mistral full", "qwen2", "qwen2 window", "qwen3", "qwen3 padded")),
        family_fields("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=0),
    ],
    ids=lambda fields: fields["model_type"],
)
def test_config_json_can_be_written_from_ours(fields: dict[str, Any]) -> None:
    config = config_from_huggingface(fields)
    assert config_from_huggingface(json.loads(json.dumps(huggingface_fields(config)))) == config


def test_what_belongs_to_a_model_goes_along(tmp_path: Path) -> None:
    """Tokenizer, template and generation config as they are; without a config.json one is written."""
    model = saved(tmp_path, family_fields("llama", num_hidden_layers=1, eos_token_id=[2, 5]), recipes.none())
    (model / "config.json").unlink()
    extras = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"eos_token_id": [2, 5]}',
    }
    for name, text in extras.items():
        (model / name).write_text(text)
    folder = exported(model, "huggingface", "bfloat16")
    assert {name: (folder / name).read_text() for name in extras} == extras
    assert {path.name for path in folder.iterdir()} == {*extras, "config.json", "model.safetensors"}
    assert open_checkpoint(folder).config == StoredModel.open(model).config
    dtypes = {name: tensor.dtype for name, tensor in tensors_in(folder / "model.safetensors").items()}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {"BF16"}


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture, caplog: Any) -> None:
    model = saved(tmp_path, family_fields("llama", **WIDE), recipes.rtn())
    caplog.set_level("INFO", export_module.logger.name)
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 0.1 MB (compressed-tensors)\n"
    assert "not exported: the cache in int4" in caplog.text
    assert "differ from ours by " in caplog.text
    assert main(arguments) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


# --- refusals -------------------------------------------------------------------------------------------------


def refused(model: Path, said: str, form: ExportFormat = "huggingface") -> None:
    before = sorted(model.parent.iterdir())
    with pytest.raises(ValueError, match=said):
        exported(model, form)
    assert sorted(model.parent.iterdir()) == before


def test_what_has_no_form_is_refused_by_name(tmp_path: Path) -> None:
    fields = family_fields("llama", **WIDE)
    floats = saved(tmp_path / "floats", fields, recipes.none())
    refused(
        floats.with_name("source"), "source is a Hugging Face checkpoint; expected a model that fireq-convert wrote"
    )
    refused(floats, "no quantized layers .* llama .* use --format huggingface", "compressed-tensors")
    nf4 = saved(tmp_path / "nf4", fields, dataclasses.replace(recipes.rtn(), weight_format="nf4"))
    refused(nf4, "weight_format of .*qkv_proj is 'nf4'; .* use --format huggingface", "compressed-tensors")
    (floats / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5e-6}))
    refused(floats, "config.json of a llama says rms_norm_eps 5e-07; expected 1e-06, as in fireq.json")
    granite = saved(tmp_path / "granite", family_fields("granite", num_hidden_layers=1), recipes.none())
    (granite / "config.json").unlink()
    refused(
        granite, "no config.json, and that of a granite cannot be written, only one of llama, mistral, qwen2, qwen3"
    )


def test_heads_that_their_checkpoints_cannot_hold_are_refused(tmp_path: Path) -> None:
    fields = family_fields("qwen3", num_hidden_layers=1)
    gains = {"self_attn.k_norm": np.random.default_rng(0).uniform(1, 2, (2, 16)).astype(np.float32)}
    model = saved(tmp_path / "gains", fields, recipes.none(), gains)
    refused(model, "layer 0 of a qwen3: norms of queries and keys have gains for each head")
    spread = dataclasses.replace(recipes.none(), smoothing=SmoothingConfig(
        value_basis="hadamard", pre_rope=False, post_rope_channels=0
    ))  # fmt: skip
    padded = saved(tmp_path / "padded", family_fields("llama padded", num_hidden_layers=1), spread)
    refused(padded, "heads of 80 channels are padded to 128, and value_basis 'hadamard'")


def test_a_changed_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path, family_fields("llama", num_hidden_layers=1), recipes.none())
    part = next(path for path in (model / "params/layers.0").rglob("*") if path.is_file() and path.stat().st_size > 50)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    refused(model, "layers.0 has changed")
