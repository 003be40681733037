"""Ops say which operand is of the wrong kind, what it is and what they expect."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, formats
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul import matmul
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized_tensor import quantize
from pallas_kernels.rope_quantize import rope_quantize
from pallas_kernels.row_quantize import quantize_rows, rms_norm_quantize, sum_norm_quantize

ROWS = jnp.ones((2, 64), jnp.float32)
WEIGHT = quantize(jnp.ones((64, 64)), format="fp8")
QUERY = ScaledArray(jnp.ones((1, 3, 2, 16)), None, "none")
CACHE = ScaledArray(jnp.ones((1, 2, 3, 16)), None, "none")
FP8 = formats.quantize_fp8(QUERY.values)
START, LENGTHS = jnp.zeros(1, jnp.int32), jnp.full(1, 3, jnp.int32)
ANGLES = jnp.ones((1, 3, 8))

OPERANDS = {
    prefill_attention: {"query": QUERY, "key": CACHE, "value": CACHE, "kv_lengths": LENGTHS, "scale": 1.0},
    decode_attention: {
        "query": QUERY, "key": CACHE, "value": CACHE, "query_start": START, "kv_lengths": LENGTHS, "scale": 1.0,
    },
    rope_quantize: {
        "packed": jnp.ones((1, 3, 96)), "cos": ANGLES, "sin": ANGLES, "key": CACHE, "value": CACHE, "start": START,
        "lengths": LENGTHS,
    },
    matmul: {"x": ROWS, "weight": WEIGHT},
    quantize_rows: {"x": ROWS},
    rms_norm_quantize: {"x": ROWS, "weight": jnp.ones(64), "eps": 1e-5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "wrong", "message"),
    [
        (prefill_attention, "query", QUERY.values, r"query is an array float32\[1, 3, 2, 16\]; expected a ScaledArray"),
        (prefill_attention, "key", np.ones(3), r"key is an array float64\[3\]; expected a ScaledArray"),
        (prefill_attention, "value", tuple(CACHE), "value is of type tuple; expected a ScaledArray"),
        (
            prefill_attention,
            "value",
            ScaledArray([1.0], None, "none"),
            r"value\.values is of type list; expected an array",
        ),
        (
            prefill_attention,
            "query",
            dataclasses.replace(FP8, scale=2.0),
            r"query\.scale is of type float; expected an array",
        ),
        (
            prefill_attention,
            "query",
            dataclasses.replace(FP8, scale=jnp.ones((1, 3, 1))),
            r"query scale has shape \(1, 3, 1\)",
        ),
        (prefill_attention, "kv_lengths", 3, "kv_lengths is of type int; expected an array"),
        (prefill_attention, "query_start", [0], "query_start is of type list; expected an array"),
        (decode_attention, "query_start", None, "query_start is None; expected an array"),
        (decode_attention, "key", CACHE.values, "key is an array float32.*; expected a ScaledArray"),
        (decode_attention, "page_table", [[0]], "page_table is of type list; expected an array or None"),
        (rope_quantize, "packed", QUERY, "packed is of type ScaledArray; expected an array or a SplitKPartials"),
        (rope_quantize, "key", CACHE.values, "key is an array float32.*; expected a ScaledArray"),
        (rope_quantize, "start", 0, "start is of type int; expected an array"),
        (rope_quantize, "key_offset", 0.0, "key_offset is of type float; expected an array or None"),
        (matmul, "x", [1.0], "x is of type list; expected a ScaledArray or an array"),
        (matmul, "weight", jnp.ones((64, 64)), r"weight is an array float32\[64, 64\]; expected a QuantizedTensor"),
        (matmul, "bias", 1.0, "bias is of type float; expected an array or None"),
        (quantize_rows, "x", formats.quantize_fp8(ROWS), "x is of type ScaledArray; expected an array"),
        (rms_norm_quantize, "weight", None, "weight is None; expected an array"),
    ],
)
def test_an_operand_of_another_kind_is_named(op, name, wrong, message):
    with pytest.raises(ValueError, match=message):
        op(**OPERANDS[op] | {name: wrong})


def test_a_plain_array_is_no_sum_in_parts():
    with pytest.raises(ValueError, match=r"partials is an array float32\[2, 64\]; expected a SplitKPartials"):
        sum_norm_quantize(ROWS, jnp.ones(64), 1e-5)


def test_queries_start_at_0_unless_said():
    operands = OPERANDS[prefill_attention]
    expected = prefill_attention(**operands, query_start=START)
    np.testing.assert_array_equal(prefill_attention(**operands), expected)


@pytest.mark.parametrize("op", list(OPERANDS))
def test_another_implementation_is_an_error(op):
    with pytest.raises(ValueError, match=r"implementation is 'triton'; expected one of .*'mosaic_gpu'"):
        op(**OPERANDS[op], implementation="triton")


def test_without_a_hopper_gpu_the_device_is_named_before_the_operands(monkeypatch):
    monkeypatch.setattr(dispatch, "default_device", lambda: type("Device", (), {"platform": "cpu"}))
    with pytest.raises(NotImplementedError, match=r"the default device is 'cpu', not a GPU; and the weight is FP8"):
        matmul(ROWS, WEIGHT, implementation="mosaic_gpu")
