"""Checkpoints that others quantized: the same function as the floats that they stand for, and refused if damaged."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_files as files
from tiny_llama import config_of, weights_of

from fireq_jax import AutoModelForCausalLM
from fireq_jax.checkpoints.reader import open_checkpoint
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
    model, found = logits_of(quantized)
    exact, expected = logits_of(floats)
    assert model.quantization.weight_format == case.kept
    assert distance(found, expected) <= case.bound
    for weight, other in zip(*(parameters_of(each).values() for each in (model, exact)), strict=True):
        if isinstance(weight, QuantizedTensor):
            scale = np.abs(other).max()
            limit = 2.0**-8 if name.startswith("gptq") else 1e-6  # float16 scales are rounded to bf16
            assert np.abs(weight.dequantize() - other).max() <= limit * scale
