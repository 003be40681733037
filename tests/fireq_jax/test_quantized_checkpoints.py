"""Checkpoints that others quantized: the same function as the floats that they stand for, and refused if damaged."""

import functools
import json
import logging
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_files as files
from tiny_families import family_fields
from tiny_llama import config_of, weights_of

from fireq_jax import AutoModelForCausalLM
from fireq_jax.checkpoints import compressed_tensors
from fireq_jax.checkpoints.huggingface import read_config
from fireq_jax.checkpoints.reader import open_checkpoint
from fireq_jax.checkpoints.storage import ScaleGrid, coded
from fireq_jax.models.block import fuse_block
from fireq_jax.models.coded_weight import CodedKind, CodedWeight, as_float
from fireq_jax.models.parameters import parameters_of
from pallas_kernels.quantized_tensor import QuantizedTensor

FIELDS = config_of(
    "gqa", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
)
TENSORS = weights_of(FIELDS)
TOKENS = jnp.arange(24)[None] * 7 % FIELDS["vocab_size"]
FLOAT8 = {"type": "float", "num_bits": 8, "dynamic": True, "strategy": "token"}
DOWN = "model.layers.0.mlp.down_proj"


class Case(NamedTuple):
    """A format; ``kept`` is the format of the weights that the model then has, ``bound`` of its logits."""

    store: Any
    said: dict[str, Any]
    kept: str = "none"
    bound: float = 1e-5
    file: str = "config.json"


def compressed(form: str, store: Any, kept: str = "none", bound: float = 1e-5, **said: Any) -> Case:
    return Case(store, files.compressed_config(form, **said), kept, bound)


float8 = functools.partial(compressed, "float-quantized", num_bits=8, kind="float", inputs=FLOAT8)
# FP8 weights multiply FP8 activations.
ROUNDED = 0.1
CASES = {
    "int4 g128": compressed("pack-quantized", files.compressed_int(128), "int4"),
    "int4 g64": compressed("pack-quantized", files.compressed_int(64), "int4", group=64),
    "int4 g32": compressed("pack-quantized", files.compressed_int(32), group=32),
    "int4 channel": compressed("pack-quantized", files.compressed_int(None), "int4", group=None),
    "int4 asymmetric": compressed("pack-quantized", files.compressed_int(64, asym=True), group=64, symmetric=False),
    "int8 asymmetric": compressed(
        "int-quantized", files.compressed_int(None, bits=8, packed=False, asym=True), group=None, num_bits=8,
        symmetric=False,
    ),
    "w4afp8 packed": compressed("pack-quantized", files.compressed_int(128), "int4", ROUNDED, inputs=FLOAT8),
    "w4afp8 int8": compressed("int-quantized", files.compressed_int(128, packed=False), "int4", ROUNDED, inputs=FLOAT8),
    "w8a16": compressed("pack-quantized", files.compressed_int(128, bits=8), num_bits=8),
    "w8a8": compressed(
        "int-quantized", files.compressed_int(None, bits=8, packed=False), num_bits=8, group=None,
        inputs={"type": "int", "num_bits": 8, "dynamic": True},
    ),
    "fp8 channel": float8(files.fp8(1, None, dtype=files.BF16), "fp8", ROUNDED, strategy="channel"),
    "fp8 tensor": float8(files.fp8(None, None, shape=(1,), inputs=True), "fp8", ROUNDED, strategy="tensor"),
    "fp8 block": float8(files.fp8(128, 128), strategy="block", block_structure=[128, 128]),
    "mxfp4": compressed("mxfp4-pack-quantized", files.mxfp4, "fp8", ROUNDED, kind="float", group=32),
    "nvfp4": compressed("nvfp4-pack-quantized", files.nvfp4, kind="float", group=16, strategy="tensor_group"),
    "gptq": Case(files.gptq(), files.gptq_config(checkpoint_format="gptq"), "int4", 5e-3),
    "gptq v2": Case(files.gptq(64, offset=0), files.gptq_config(64, checkpoint_format="gptq_v2"), "int4", 5e-3),
    "gptq of old": Case(
        files.gptq(index=False), {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}, "int4", 5e-3,
        "quantize_config.json",
    ),
    "gptq channel": Case(files.gptq(None), files.gptq_config(None, desc_act=True), "int4"),
    "gptq asymmetric": Case(files.gptq(sym=False), files.gptq_config(sym=False)),
    "gptq 8 bits": Case(files.gptq(bits=8), files.gptq_config(bits=8)),
    "gptq in order of activations": Case(files.gptq(64, order=True), files.gptq_config(64, desc_act=True)),
    "awq": Case(
        files.awq(64), {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    ),
    "awq of old": Case(
        files.awq(64), {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        file="quant_config.json",
    ),
    "hugging face fp8": Case(
        files.fp8(64, 64, name=".weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [64, 64]}
    ),
    "hugging face fp8 with powers of two": Case(
        files.fp8(64, 64, name=".weight_scale_inv", dtype=ml_dtypes.float8_e8m0fnu),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ),
    "hugging face fp8 tensor": Case(
        files.fp8(None, None, name=".weight_scale_inv", shape=()),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, "fp8", ROUNDED,
    ),
    "autofp8": Case(
        files.fp8(None, None, shape=(), inputs=True), {"quant_method": "fp8", "activation_scheme": "static"}, "fp8",
        ROUNDED,
    ),
    "fbgemm": Case(files.fp8(1, None), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8", ROUNDED),
    "modelopt fp8": Case(
        files.fp8(None, None, shape=(), inputs=True), {"quantization": {"quant_algo": "FP8", "exclude_modules": []}},
        "fp8", ROUNDED, "hf_quant_config.json",
    ),
    "modelopt w4a8 awq": Case(
        files.modelopt_int4(64), {"quantization": {"quant_algo": "W4A8_AWQ", "group_size": 64}},
        file="hf_quant_config.json",
    ),
    "modelopt nvfp4": Case(
        functools.partial(files.nvfp4, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    ),
    "nf4": Case(files.nf4(nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4 twice": Case(files.nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes 8 bits": Case(files.bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip


def write(folder, name, **options):
    case = CASES[name]
    return files.write_quantized(folder, FIELDS, TENSORS, case.store, case.said, case.file, **options)


def logits_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=jnp.float32)
    return model, np.asarray(model(TOKENS))


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_it_runs_as_the_floats_that_it_stands_for(tmp_path, name):
    case = CASES[name]
    quantized, floats = write(tmp_path, name)
    open_checkpoint(quantized).check_finite(progress=False)
    model, exact = (AutoModelForCausalLM.from_pretrained(each, dtype=jnp.float32) for each in (quantized, floats))
    assert model.quantization.weight_format == case.kept
    for weight, other in zip(*(parameters_of(each).values() for each in (model, exact)), strict=True):
        found = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        limit = 2.0**-8 if isinstance(weight, QuantizedTensor) and name.startswith("gptq") else 1e-6  # bf16 of float16
        assert np.abs(found - other).max() <= limit * np.abs(other).max()
    if case.kept != "none":
        assert distance(np.asarray(model(TOKENS)), np.asarray(exact(TOKENS))) <= case.bound


# --- what stays float, and what is not needed ------------------------------------------------------------


def test_layers_left_out_stay_float_as_a_whole(tmp_path, caplog):
    quantized, floats = write(tmp_path, "int4 g128", ignore=("o_proj", "gate_proj"))
    with caplog.at_level(logging.WARNING):
        model, found = logits_of(quantized)
    assert "2 of 4 linear layers keep their codes" in caplog.text
    assert model.quantization.keep_float == ("layers.0.self_attn.o_proj", "layers.0.mlp.gate_up_proj")
    assert distance(found, logits_of(floats)[1]) <= 1e-5


def test_of_several_formats_that_of_most_weights_is_kept(tmp_path):
    attention = files.compressed_config("float-quantized", num_bits=8, kind="float", strategy="channel", inputs=FLOAT8)
    said = files.compressed_config("mixed-precision")
    said["config_groups"] = {
        "attention": {**attention["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"],
                      "format": "float-quantized"},
        "others": {**said["config_groups"]["group_0"], "format": "pack-quantized"},
    }  # fmt: skip
    one, other = files.compressed_int(128), files.fp8(1, None)
    quantized, floats = files.write_quantized(
        tmp_path, FIELDS, TENSORS, lambda w: (other if w.shape[1] == 128 and w.shape[0] <= 128 else one)(w), said
    )
    model, found = logits_of(quantized)
    assert model.quantization.weight_format == "int4"
    assert model.quantization.keep_float == ("layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj")
    assert distance(found, logits_of(floats)[1]) <= 1e-5


def test_codes_of_minus_eight_become_minus_seven_and_are_counted(tmp_path, caplog):
    said = files.compressed_config("pack-quantized")
    quantized, floats = files.write_quantized(tmp_path, FIELDS, TENSORS, files.compressed_int(128, low=-8), said)
    codes = [files.integers(w, 128, files.BF16, low=-8)[0] for n, w in TENSORS.items() if n.endswith("_proj.weight")]
    count = sum((each == -8).sum() for each in codes)
    assert count > 20
    with caplog.at_level(logging.INFO):
        _, found = logits_of(quantized)
    assert f"{count} codes of -8 are -7" in caplog.text
    assert 1e-4 < distance(found, logits_of(floats)[1]) <= 0.1


def test_tensors_for_others_kernels_are_not_needed(tmp_path, caplog):
    quantized, _ = write(tmp_path, "gptq")
    reader = open_checkpoint(quantized)
    tensors = {name: reader._reader.read(tensor) for name, tensor in reader._tensors.items()}
    tensors |= {
        f"{DOWN}.bias": np.zeros(128, np.float16),
        f"{DOWN}.input_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.k_proj.k_scale": np.ones((), np.float32),
    }
    files.write_safetensors(quantized / "model.safetensors", tensors)
    with caplog.at_level(logging.INFO):
        assert set(open_checkpoint(quantized).coded) == set(reader.coded)
    assert "scales for quantized keys and values are not used" in caplog.text
    tensors[f"{DOWN}.bias"][3] = 1
    files.write_safetensors(quantized / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"unexpected tensor {DOWN}.bias"):
        open_checkpoint(quantized)


# --- other families' tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "group"),
    [("llama padded", 128), ("llama padded", None), ("phi3", 64), ("granite", None), ("glm", 128), ("mixtral", 64),
     ("mixtral", None)],
)  # fmt: skip
def test_codes_follow_what_is_done_to_a_familys_tensors(tmp_path, case, group):
    fields = family_fields(case, num_hidden_layers=1)
    said = files.compressed_config("pack-quantized", group=group)
    quantized, floats = map(
        open_checkpoint,
        files.write_quantized(tmp_path, fields, weights_of(fields), files.compressed_int(group), said),
    )
    # Columns of padded heads are between those of a group.
    grouped_padding = case == "llama padded" and group is not None
    assert len(quantized.coded) == (3 if grouped_padding else 4)
    found, expected = fuse_block(quantized.block(0)), fuse_block(floats.block(0))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, CodedWeight) == (f"layers.0.{name.removesuffix('.weight')}" in quantized.coded)
        np.testing.assert_allclose(as_float(tensor), as_float(expected[name]), rtol=1e-6, atol=0)
        if isinstance(tensor, CodedWeight) and case in ("llama padded", "mixtral"):
            packed = tensor.pack(64, "bf16")
            np.testing.assert_allclose(packed.dequantize(), as_float(expected[name]), rtol=1e-6, atol=0)


def test_gpt_oss_as_it_is_published(tmp_path):
    fields = family_fields("gpt_oss", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    tensors, floats = dict(weights_of(fields)), {}
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        weight = tensors.pop(name).swapaxes(1, 2)  # [E, N, K], as they are stored in MXFP4
        stored = [files.mxfp4(matrix) for matrix in weight]
        blocks = np.stack([each.parts[".weight_packed"] for each in stored])
        tensors[f"{name}_blocks"] = blocks.reshape(*blocks.shape[:2], -1, 16)
        tensors[f"{name}_scales"] = np.stack([each.parts[".weight_scale"] for each in stored])
        floats[name] = np.stack([each.dense for each in stored]).swapaxes(1, 2).astype(np.float32)
    for folder, content, said in (("q", tensors, {"quant_method": "mxfp4"}), ("f", tensors | floats, None)):
        (tmp_path / folder).mkdir()
        content = {name: x for name, x in content.items() if said or not name.endswith(("_blocks", "_scales"))}
        (tmp_path / folder / "config.json").write_text(json.dumps({**fields, "quantization_config": said}))
        files.write_safetensors(tmp_path / folder / "model.safetensors", content)
    quantized, exact = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "f")
    assert set(quantized.coded) == {"layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"}
    found, expected = fuse_block(quantized.block(0)), fuse_block(exact.block(0))
    for name, tensor in found.items():
        np.testing.assert_array_equal(as_float(tensor), as_float(expected[name]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=jnp.float32)
    assert isinstance(parameters_of(model)["layers.0.mlp.experts.down_proj.weight"], QuantizedTensor)


@pytest.mark.parametrize("columns", [72, 24])
@pytest.mark.parametrize(("form", "store"), [("mxfp4", files.mxfp4), ("nvfp4", files.nvfp4)])
def test_a_last_group_may_be_smaller(form, store, columns):
    weight = np.random.default_rng(0).standard_normal((8, columns)).astype(np.float32)
    stored = store(weight)
    said = files.compressed_config(f"{form}-pack-quantized", kind="float")
    storage = compressed_tensors.read_format(said).storage_of("model.layers.0.mlp.down_proj")
    np.testing.assert_allclose(as_float(storage.decode(stored.parts, weight.shape)), stored.dense, rtol=1e-6)


def test_a_group_of_zeros_leaves_the_others_scales_their_digits():
    codes = np.ones((2, 256), np.int8)
    scale = np.array([[0, 1e-6], [0, 0]], np.float32)
    weight = coded(codes, scale, ScaleGrid(1, 128), CodedKind("int4", 128))
    expected = np.repeat(scale, 128, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), expected)
    np.testing.assert_allclose(weight.pack(128, "e4m3").dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"quantization_status": "frozen"}, {"quantization_status": None}])
def test_what_early_versions_of_compressed_tensors_say(tmp_path, changes):
    def store(weight):
        stored = files.compressed_int(64)(weight)
        zeros = np.zeros(stored.parts[".weight_scale"].shape, np.int8)
        return stored._replace(parts={**stored.parts, ".weight_zero_point": zeros})

    quantized, floats = files.write_quantized(
        tmp_path, FIELDS, TENSORS, store, {**files.compressed_config("pack-quantized", group=64), **changes}
    )
    for name, tensor in open_checkpoint(quantized).block(0).items():
        np.testing.assert_array_equal(as_float(tensor), open_checkpoint(floats).block(0)[name])


# --- damaged and refused -------------------------------------------------------------------------------------


def changed(name, **changes):
    """Tensors of a case's folder with some replaced, or left out."""

    def change(tensors):
        tensors |= {f"{DOWN}.{part}": function(tensors.get(f"{DOWN}.{part}")) for part, function in changes.items()}
        return {each: array for each, array in tensors.items() if array is not None}

    return name, change


def nothing(_):
    return None


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


DAMAGED = [
    (changed("int4 g128", weight_scale=nothing), rf"{DOWN}\.weight_scale is missing; .*model\.safetensors"),
    (
        changed("int4 g128", weight_packed=lambda x: x[:, 1:]),
        rf"{DOWN}\.weight_packed in .*shape \(128, 23\); expected",
    ),
    (
        changed("int4 g128", weight_scale=lambda x: x[:, :1]),
        rf"{DOWN}\.weight_scale in .*\(128, 1\); expected \(128, 2\)",
    ),
    (changed("int4 g128", weight_shape=lambda x: x[::-1]), rf"{DOWN}\.weight in .*weight_shape is \(192, 128\)"),
    (changed("int4 g128", weight_scale=lambda x: -x), rf"{DOWN}\.weight in .*a scale is -.*expected positive"),
    (changed("int4 g128", weight_scale=lambda x: x * np.nan), rf"{DOWN}\.weight in .*holds nan"),
    (changed("int4 g128", weight_scale=lambda x: x.astype(np.int32)), rf"{DOWN}\.weight_scale .*dtype I32"),
    (changed("int4 g128", weight=lambda _: np.zeros((128, 192), np.float32)), "unexpected tensor .*weight_packed"),
    (
        changed("w4afp8 int8", weight_packed=lambda _: np.zeros((128, 24), np.int32)),
        "expected one of weight_packed and",
    ),
    (
        changed("int4 g128", weight_zero_point=lambda _: np.ones((128, 2), np.int8)),
        rf"{DOWN}\.weight in .*weight_zero_point is not 0 everywhere",
    ),
    (changed("int4 asymmetric", weight_zero_point=lambda x: x[0, 0]), r"weight_zero_point in .*shape \(\); expected"),
    (changed("int4 asymmetric", weight_zero_point=nothing), rf"{DOWN}\.weight_zero_point is missing"),
    (changed("fp8 channel", weight=lambda x: x.view(np.int8)), rf"{DOWN}\.weight in .*dtype I8; expected F8_E4M3"),
    (changed("fp8 channel", weight=lambda x: np.full_like(x, np.nan)), rf"{DOWN}\.weight in .*holds nan"),
    (changed("hugging face fp8", weight_scale_inv=lambda x: x[:1]), rf"{DOWN}\.weight_scale_inv in .*shape \(1, 3\)"),
    (changed("gptq", qzeros=lambda x: x + 0x11111111), rf"{DOWN}\.weight in .*zero point of 9; expected 8"),
    (changed("gptq", qzeros=nothing), rf"{DOWN}\.qzeros is missing"),
    (changed("gptq", g_idx=lambda x: x[::-1]), rf"{DOWN}\.weight in .*g_idx is not in order"),
    (changed("gptq", g_idx=lambda x: x + 1), rf"{DOWN}\.weight in .*g_idx reaches from 1 to 2"),
    (changed("awq", qweight=lambda x: x.T), rf"{DOWN}\.qweight in .*shape \(16, 192\); expected \(192, 16\)"),
    (changed("mxfp4", weight_scale=lambda x: np.full_like(x, 255)), rf"{DOWN}\.weight in .*a scale is NaN"),
    (changed("nf4", **{"weight.absmax": lambda x: x[1:]}), rf"{DOWN}\.weight in .*absmax has 383 numbers"),
    (changed("nf4", **{"weight.absmax": lambda x: x.astype(np.uint8)}), r"weight\.nested_absmax is missing"),
    (changed("nf4", **{NF4_STATE: lambda _: np.frombuffer(b"[7]", np.uint8)}), r"quant_state is \[7\]"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=lambda value: value if isinstance(value, str) else None)
def test_damage_is_named(tmp_path, damage, message):
    name, change = damage
    quantized, _ = write(tmp_path, name)
    reader = open_checkpoint(quantized)
    tensors = change({each: reader._reader.read(tensor) for each, tensor in reader._tensors.items()})
    files.write_safetensors(quantized / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(quantized).check_finite(progress=False)


@pytest.mark.parametrize("name", ["norm", "layers.0.input_layernorm", "embed_tokens"])
def test_floats_that_are_missing_are_not_looked_for_as_codes(tmp_path, name):
    quantized, _ = write(tmp_path, "gptq")
    reader, name = open_checkpoint(quantized), f"model.{name}.weight"
    tensors = {each: reader._reader.read(tensor) for each, tensor in reader._tensors.items() if each != name}
    files.write_safetensors(quantized / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"lacks tensor {name}, which"):
        open_checkpoint(quantized)


def test_a_file_of_several_that_is_missing(tmp_path):
    quantized, _ = write(tmp_path, "int4 g128")
    path = quantized / "model.safetensors"
    tensors = open_checkpoint(quantized)._tensors
    path.rename(quantized / "a.safetensors")
    weight_map = {name: "b.safetensors" if name.startswith(DOWN) else "a.safetensors" for name in tensors}
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"names b\.safetensors, which is not in .*{DOWN}\.weight_packed"):
        open_checkpoint(quantized)


def test_a_file_that_ends_early(tmp_path):
    quantized, _ = write(tmp_path, "fp8 channel")
    path = quantized / "model.safetensors"
    reader = open_checkpoint(quantized)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        open_checkpoint(quantized)
    with pytest.raises(ValueError, match="it ends inside tensor"):
        reader.check_finite(progress=False)


INT4 = files.compressed_config("pack-quantized")


def one_group(**changes):
    return {**INT4, "config_groups": {"g": {**INT4["config_groups"]["group_0"], **changes}}}


REFUSED = [
    ({"quant_method": "hqq"}, "quant_method is 'hqq'; expected one of .*gptq"),
    ({}, "quant_method is None"),
    ({**INT4, "transform_config": {"config_groups": {"u": {}}}}, "transform_config is .*quantize the model without"),
    ({**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*save the model dense"),
    ({**INT4, "quantization_status": "calibration"}, "quantization_status is 'calibration'"),
    ({**INT4, "sparsity_config": [1]}, r"sparsity_config is \[1\]"),
    ({**INT4, "config_groups": {}}, "config_groups is empty"),
    ({**INT4, "config_groups": {"g": None}}, r"config_groups\.g is None; expected an object"),
    (one_group(targets=["re:("]), r"config_groups\.g\.targets has 're:\('"),
    (one_group(input_activations="fp8"), r"config_groups\.g\.input_activations is 'fp8'"),
    (files.compressed_config("pack-quantized", group=10**30), "group_size is 10+; expected a whole number from 1"),
    (files.compressed_config("marlin-24"), r"config_groups\.group_0\.format is 'marlin-24'"),
    (files.compressed_config("pack-quantized", num_bits=3), "num_bits 3 and type 'int'; expected 4 or 8"),
    (files.compressed_config("pack-quantized", group=0), "group_size is 0"),
    (files.compressed_config("pack-quantized", strategy="token"), "strategy is 'token'"),
    (files.compressed_config("pack-quantized", strategy="block"), "block_structure is None"),
    (files.gptq_config(bits=3), "bits is 3; expected 4 or 8"),
    (files.gptq_config(0), "group_size is 0"),
    (files.gptq_config(sym="yes"), "sym is 'yes'"),
    (files.gptq_config(checkpoint_format=["gptq"]), r"checkpoint_format is \['gptq'\]"),
    (files.gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (files.gptq_config(dynamic={"-:.*": {}}), "dynamic is"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; expected 'gemm'"),
    ({"quant_method": "awq", "bits": 8}, "bits is 8; expected 4"),
    ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point is False"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ"}, "quant_algo is 'W8A8_SQ'; expected one of FP8"),
    ({"quant_method": "bitsandbytes"}, "load_in_4bit is None and load_in_8bit None"),
]


@pytest.mark.parametrize(("said", "message"), REFUSED, ids=str)
def test_formats_that_are_refused_before_weights_are_looked_at(tmp_path, said, message):
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "quantization_config": said}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)
