"""Rotary embedding and its configuration against transformers' own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_llama import CASES, config_of

from fireq_jax import ModelConfig
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import RopeConfig
from fireq_jax.models.rope import rope_tables
from pallas_kernels.rope_quantize import apply_rope


def read(case="gqa", **changes):
    return config_from_huggingface(config_of(case, **changes))


def v5_form(fields):
    """The same config as transformers 5 writes it: everything about RoPE in ``rope_parameters``."""
    scaling = dict(fields.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    rest = {name: value for name, value in fields.items() if name not in ("rope_scaling", "rope_theta")}
    return {**rest, "rope_parameters": {"rope_theta": fields["rope_theta"], **scaling}}


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case):
    """Positions 0..39 (beyond the trained 16 for "dynamic_beyond"): float32 angles of up to 40 radians."""
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = np.arange(40)[None]
    tables = rope_tables(read(case), read(case).rope, jnp.asarray(positions), jnp.asarray([40]))
    pairs = read(case).width // 2
    embedding = LlamaRotaryEmbedding(transformers.LlamaConfig(**config_of(case)))
    expected = embedding(torch.zeros(1), torch.from_numpy(positions))
    for ours, theirs in zip(tables, expected, strict=True):
        assert ours.shape == (1, 40, read(case).head_dim // 2)
        np.testing.assert_allclose(ours[..., :pairs], theirs[..., :pairs].numpy(), atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_v4_and_v5_forms_give_the_same_config(case):
    fields = config_of(case)
    assert config_from_huggingface(v5_form(fields)) == config_from_huggingface(fields)


def test_transformers_own_config_reads_back(tmp_path):
    """In whatever form the installed version saves it."""
    for case in CASES:
        transformers.LlamaConfig(**config_of(case)).save_pretrained(tmp_path)
        saved = config_from_huggingface(json.loads((tmp_path / "config.json").read_text()))
        ours = dataclasses.replace(read(case), bos_token_id=saved.bos_token_id, eos_token_ids=saved.eos_token_ids)
        assert saved == ours


def test_several_forms_in_one_config_count_as_in_transformers():
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert read(rope_parameters={}, rope_scaling=scaling).rope.rope_type == "linear"
    assert read(rope_parameters={"rope_type": "default"}, rope_scaling=scaling).rope.rope_type == "linear"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read(rope_scaling=yarn, original_max_position_embeddings=32).rope.original_max_position_embeddings == 32
    assert read(rope_scaling={**yarn, "finetuned": True}) == read(rope_scaling=yarn)
    with pytest.raises(ValueError, match="rope_scaling is 'linear'; expected an object"):
        read(rope_scaling="linear")
    with pytest.raises(ValueError, match="beta_fast is 0; expected"):
        read(rope_scaling={**yarn, "beta_fast": 0})


def test_top_level_theta_counts_where_rope_parameters_lack_it():
    """As in transformers, which fills ``rope_parameters`` from the old key."""
    config = read(rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert config.rope == RopeConfig("linear", theta=500.0, factor=2.0)


def test_theta_may_be_a_large_integer():
    config = read(rope_theta=10**10)
    assert isinstance(config.rope.theta, float)
    rope_tables(config, config.rope, jnp.zeros((1, 1), int), jnp.asarray([1]))


def test_defaults_without_any_rope_key():
    fields = config_of("gqa")
    del fields["rope_theta"]
    assert config_from_huggingface(fields).rope == RopeConfig()
    assert config_from_huggingface({**fields, "rope_scaling": None, "rope_parameters": None}).rope == RopeConfig()


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope expects one for each"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'"),
        ({"rope_scaling": {"rope_type": "linear", "factr": 2.0, "factor": 2.0}}, "'factr'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear'.*factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "'yarn'.*factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, r"factor.* 0\.0"),
        ({"rope_theta": -1.0}, r"-1\.0"),
        ({"rope_theta": [1]}, r"rope_theta is .*1.*; expected a number"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"theta is 1\.0; YaRN"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}}, r"low_freq_factor is 4\.0"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor is 0\.25"),
        ({"model_type": "mamba"}, "'mamba'; expected one of .*llama"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_key_value_heads": 3}, "num_heads is 4.*3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_unsupported_configs_are_errors_that_quote_the_value(changes, quoted):
    with pytest.raises(ValueError, match=quoted):
        read(**changes)


def test_unknown_keys_are_ignored_aloud(caplog):
    read(residual_multiplier=0.5)
    assert "residual_multiplier" in caplog.text


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_end_of_sequence_ids(eos, ids):
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize("case", ["gqa", "yarn_options"])
def test_own_json_round_trip_and_unknown_keys(case):
    config = read(case, eos_token_id=[1, 2])
    fields = config.to_dict()
    assert ModelConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="'layers'"):
        ModelConfig.from_dict({**fields, "layers": 3})
    with pytest.raises(ValueError, match="'base'"):
        ModelConfig.from_dict({**fields, "rope": {**fields["rope"], "base": 3}})


def test_scores_depend_on_distance_only():
    """q at m and k at n give the score of m + 7 and n + 7: the pairs (i, i + H/2) really rotate."""
    config = read()
    q, k = (jax.random.normal(jax.random.key(i), (1, 5, 1, 12)) for i in (0, 1))

    def scores(offset):
        tables = rope_tables(config, config.rope, jnp.arange(5)[None] + offset, jnp.asarray([64]))
        return jnp.einsum("bthd,bshd->ts", apply_rope(q, *tables), apply_rope(k, *tables))

    np.testing.assert_allclose(scores(0), scores(7), atol=1e-5)
    rotated = apply_rope(q, *rope_tables(config, config.rope, jnp.arange(5)[None], jnp.asarray([5])))
    lengths = [np.hypot(x[..., :6], x[..., 6:]) for x in (q, rotated)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_dynamic_base_is_each_sequences_own():
    """The short sequence of a batch keeps the trained base, whatever the longer one does."""
    config = read("dynamic_beyond")
    positions = jnp.broadcast_to(jnp.arange(40), (2, 40))
    cos, _ = rope_tables(config, config.rope, positions, jnp.asarray([10, 40]))
    alone, _ = rope_tables(config, config.rope, positions[:1], jnp.asarray([10]))
    np.testing.assert_array_equal(cos[0], alone[0])
    assert np.abs(cos[0] - cos[1]).max() > 0.1
