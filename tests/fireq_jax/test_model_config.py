"""Configs: what no model has is refused by the name of its field, and what models really say is read."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_llama import config_of

from fireq_jax import ModelConfig
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import RopeConfig

FIELDS = config_of("gqa", bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_bias=False, mlp_bias=False)
CONFIG = config_from_huggingface(FIELDS)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NAN, INFINITY = float("nan"), float("inf")
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings"]  # fmt: skip
OTHERS = ["rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id",
          "eos_token_id", "pad_token_id", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
          "hidden_act", "is_causal", "sliding_window", "layer_types", "model_type"]  # fmt: skip


def read(**changes):
    return config_from_huggingface({**FIELDS, **changes})


@pytest.mark.parametrize("value", ["2", 2.0, True, [2], {}, 0, -1, 2**31, 10**400, NAN, INFINITY], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_whole_numbers_that_a_model_may_have(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*expected"):
        read(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rms_norm_eps": [1e300, 1e-300, -1e-6, NAN, INFINITY, "1e-6", 10**400],
        "rope_theta": [1e300, 1e-300, 0, -10000.0, NAN, INFINITY, "10000", True, 10**400],
        "original_max_position_embeddings": [-1, 0, 8192.0, 10**30],
        "bos_token_id": [-2, 1.0, "1", True, [1], 2**24, 10**400],
        "pad_token_id": [-2, 0.0, "0", False, [0], 2**24, 10**400],
        "eos_token_id": [-1, 67, 2.0, "2", True, [2, -1], [2, 67], [None], [[2]], 10**400],
        "tie_word_embeddings": [1, "true", "False", []],
        "attention_bias": [0, "no"],
        "mlp_bias": [0, "no"],
        "hidden_act": ["gelu", None, ["silu"]],
    }.items(),
)
def test_nonsense_is_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}s? is .*(expected|supported)"):
            read(**{name: value})


@pytest.mark.parametrize(
    ("scaling", "name", "values"),
    [
        (YARN, "factor", [0.5, 0, -4.0, 1e300, NAN, INFINITY, "4", True]),
        (YARN, "original_max_position_embeddings", [-64, 0, 64.0, NAN, "64", 10**30]),
        (YARN, "attention_factor", [-1.0, 0, NAN, INFINITY, 1e300, "1"]),
        (YARN, "beta_fast", [0, -1, NAN, INFINITY, 0.5]),
        (YARN, "beta_slow", [0, -1, NAN, INFINITY, 64.0]),
        (YARN, "mscale", [-1.0, NAN, INFINITY]),
        (YARN, "mscale_all_dim", [-1.0, NAN, INFINITY]),
        (YARN, "truncate", [0, "false"]),
        (LLAMA3, "low_freq_factor", [0, -1.0, NAN, INFINITY, 4.0, 5.0]),
        (LLAMA3, "high_freq_factor", [0, -1.0, NAN, INFINITY, 1.0]),
        (LLAMA3, "rope_type", [None, "default", "llama4", 3, ["llama3"]]),
    ],
)
def test_nonsense_about_rope_is_refused(scaling, name, values):
    """From config.json, and from fireq.json and Python as well."""
    assert read(rope_scaling=scaling).rope.factor == scaling["factor"]
    for value in values:
        with pytest.raises(ValueError, match=name):
            read(rope_scaling={**scaling, name: value})
        if value is not None:
            with pytest.raises(ValueError, match=name):
                RopeConfig.from_dict({**scaling, name: value})


def test_own_dict_is_checked_in_the_same_way():
    fields = CONFIG.to_dict()
    for change in [{"num_layers": 100_000}, {"rms_norm_eps": INFINITY}, {"eos_token_ids": [67]}, {"pad_token_id": -2}]:
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .*expected"):
            ModelConfig.from_dict({**fields, **change})
    with pytest.raises(ValueError, match="theta is inf"):
        ModelConfig.from_dict({**fields, "rope": {"theta": INFINITY}})
    with pytest.raises(ValueError, match="eos_token_ids is 2; expected a tuple"):
        dataclasses.replace(CONFIG, eos_token_ids=2)


def test_ids_that_are_none():
    """Early Llamas pad with -1; others name tokens that were added to the tokenizer alone."""
    assert read(pad_token_id=-1).pad_token_id == -1
    assert read(pad_token_id=67, bos_token_id=32000) == dataclasses.replace(
        CONFIG, pad_token_id=None, bos_token_id=None
    )
    assert read(eos_token_id=[]).eos_token_ids == ()


def test_an_id_beyond_the_vocabulary_is_dropped_aloud(caplog):
    read(pad_token_id=67)
    assert "pad_token_id is 67, beyond the vocabulary" in caplog.text


def test_a_deeply_nested_value_is_quoted_in_short():
    deep = json.loads("[" * 500 + "]" * 500)
    for name in ("hidden_size", "eos_token_id", "rope_scaling", "layer_types", "model_type"):
        with pytest.raises(ValueError, match=name) as refusal:
            read(**{name: deep})
        assert len(str(refusal.value)) < 400


def test_sizes_that_do_not_go_together():
    with pytest.raises(ValueError, match="hidden_size is 50; expected a multiple of num_attention_heads 4"):
        read(hidden_size=50)
    assert read(hidden_size=50, head_dim=12).head_dim == 12
    with pytest.raises(ValueError, match="head_dim is 2; dynamic"):
        read(head_dim=2, rope_scaling={"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"is_causal": True, "is_decoder": True, "use_bidirectional_attention": False},
        {"layer_types": ["full_attention"] * 2, "sliding_window": 8},
        {"sliding_window": None, "attention_chunk_size": None, "layer_types": None},
        {"sliding_window": 64},
        {"pruned_heads": {}, "per_layer_config": None, "is_encoder_decoder": False},
    ],
)
def test_options_that_say_what_the_model_does_anyway(changes, caplog):
    assert read(**changes) == CONFIG
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": False},
        {"is_causal": None},  # which is as false to transformers
        {"use_bidirectional_attention": True},
        {"sliding_window": 63},
        {"sliding_window": 0},
        {"sliding_window": "64"},
        {"attention_chunk_size": 8},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"kv_sharing_modes": ["reuse", "reuse"]},
        {"per_layer_config": {"0": {"rms_norm_eps": 0.1}}},
        {"pruned_heads": {"0": [1]}},
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"transformers_weights": "other.safetensors"},
    ],
    ids=str,
)
def test_options_that_change_results_in_transformers_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .*(supported|expected)"):
        read(**changes)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(-3, 70) | st.just(10**300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(SIZES + OTHERS), json_values)
@example("rope_scaling", "x" * 10_000)
def test_any_value_gives_a_config_or_a_short_refusal(name, value):
    try:
        config = read(**{name: value})
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert len(refusal) < 600  # unknown keys are followed by those that are known
