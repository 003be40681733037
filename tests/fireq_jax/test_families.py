"""Every family against transformers, and against itself in other paths."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import FAMILIES, KEPT, NEW_TOKENS, reference_logits
from tiny_families import CASES, RENAMED, family_fields, family_tokens
from tiny_llama import weights_of, write_folder

from fireq_jax import AutoModelForCausalLM, LlamaForCausalLM, generate
from fireq_jax.models import architectures
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.config import ExpertsConfig

GOLDEN = np.load(FAMILIES)
HAS_TORCH = importlib.util.find_spec("torch") is not None
# Of the largest logit; float32 rounding measured 4e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The float32 model of a case, read from a checkpoint."""

    @functools.cache
    def read(case):
        fields = family_fields(case)
        folder = write_folder(tmp_path_factory.mktemp("families") / case.replace(" ", "_"), fields)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=jnp.float32)

    return read


def assert_near(logits, expected):
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_equal_transformers(case, model_of):
    """40 tokens and 8 new ones: longer than the windows, and past the positions of pre-training."""
    model, tokens = model_of(case), family_tokens()
    output = generate(model, tokens, max_new_tokens=NEW_TOKENS, eos_token_ids=())
    logits = np.asarray(model(tokens))
    np.testing.assert_array_equal(output.sequences[:, : tokens.shape[1]], tokens)
    assert_near(logits[:, KEPT], GOLDEN[f"{case}.logits"])
    np.testing.assert_array_equal(output.sequences[:, tokens.shape[1] :], GOLDEN[f"{case}.text"])
    if HAS_TORCH:
        fields = family_fields(case)
        assert_near(logits, reference_logits(fields, weights_of(fields), tokens))


@pytest.mark.parametrize("case", RENAMED)
def test_families_that_are_llamas_by_other_names(case, tmp_path):
    """The same tensors in the same order under Llama's names give the same logits."""
    fields = family_fields(case)
    config = config_from_huggingface(fields)
    llama = family_fields("llama", attention_bias=config.attention_bias, rms_norm_eps=config.rms_norm_eps)
    tables = [tensor_table(each, config_from_huggingface(each)) for each in (fields, llama)]
    tensors, renamed = weights_of(fields), {}
    for ours, theirs in zip(*(table.outside.values() for table in tables), strict=True):
        renamed[theirs.name] = tensors[ours.name]
    for index in range(config.num_layers):
        prefixes = [table.prefix.format(index=index) for table in tables]
        for name, source in tables[0].block.items():
            renamed[prefixes[1] + tables[1].block[name].name] = tensors[prefixes[0] + source.name]
    if config.attention_bias:  # Llama has one of attention's output too
        for index in range(config.num_layers):
            renamed[f"model.layers.{index}.self_attn.o_proj.bias"] = np.zeros(48, np.float32)
    models = [
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / name, *checkpoint), dtype=jnp.float32)
        for name, checkpoint in (("ours", (fields, tensors)), ("llama", (llama, renamed)))
    ]
    np.testing.assert_array_equal(*(model(family_tokens()) for model in models))


WITH_STATE = (
    "mistral",
    "phi3 longrope",
    "qwen3 padded",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "hunyuan_v1_dense",
    "gpt_oss",
)


@pytest.mark.parametrize("case", WITH_STATE)
def test_padding_and_chunks_change_nothing(case, model_of):
    """Left and right padding give each row's own logits; a prompt in pieces, those of one piece."""
    model, tokens = model_of(case), family_tokens()
    alone = np.asarray(model(tokens[:1, :30]))[0]
    mask = np.ones((2, 40), np.int32)
    mask[0, :10] = mask[1, 30:] = 0
    rows = np.stack([np.roll(np.resize(tokens[0, :30], 40), 10), np.resize(tokens[0, :30], 40)])
    rows[0, 10:], rows[1, :30] = tokens[0, :30], tokens[0, :30]
    padded = np.asarray(model(rows, mask))
    assert_near(padded[0, 10:], alone)
    assert_near(padded[1, :30], alone)
    if model.config.rope.rope_type == "longrope":
        return  # keys of a cache keep the frequencies of their time, as in transformers
    whole = np.asarray(model(tokens))
    lengths = jnp.full((2,), 17, jnp.int32)
    logits, cache = model.prefill(jnp.asarray(tokens[:, :17]), lengths, 48)
    assert_near(logits, whole[:, 16])
    logits, cache = model.extend(jnp.asarray(tokens[:, 17:39]), jnp.full((2,), 22, jnp.int32), cache)
    assert_near(logits, whole[:, 38])
    logits, cache = model.extend(jnp.asarray(tokens[:, 39:]), jnp.ones((2,), jnp.int32), cache)
    assert_near(logits, whole[:, 39])


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"head_dim": 12, "tie_word_embeddings": False, "window": None, "attention_bias": False}),
        ("mistral", {"window": 4096, "rms_norm_eps": 1e-6}),
        ("ministral3", {"head_dim": 128, "rms_norm_eps": 1e-5, "query_growth": 0.1, "window": None}),
        ("qwen2", {"attention_bias": True, "output_bias": False, "window": None, "tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 128, "attention_bias": False, "head_norm": "before_rope"}),
        ("smollm3", {"tie_word_embeddings": True, "rotated": (True, True, True, False)}),
        ("seed_oss", {"head_dim": 128, "attention_bias": True, "output_bias": False}),
        ("phi3", {"rms_norm_eps": 1e-5, "window": None}),
        ("olmo3", {"window": 4096, "windowed": (True, True, True, False), "norm_order": "post"}),
        ("gemma", {"head_dim": 256, "tie_word_embeddings": True, "activation": "gelu_tanh"}),
        ("gemma2", {"window": 4096, "windowed": (True, False) * 2, "attention_softcap": 50.0, "logit_softcap": 30.0}),
        ("gemma3_text", {"windowed": (), "window": 4096, "attention_softcap": None, "attention_scale": 256**-0.5}),
        ("glm", {"head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True, "output_bias": False}),
        ("exaone4", {"windowed": (True, True, True, False), "rotated": (True, True, True, False)}),
        ("ernie4_5", {"tie_word_embeddings": True, "head_dim": 128}),
        ("cohere2", {"tie_word_embeddings": True, "logit_scale": 0.0625, "rotated": (True, True, True, False)}),
        ("helium", {"rms_norm_eps": 1e-8, "head_dim": 128}),
        ("mixtral", {"rms_norm_eps": 1e-5, "window": None, "experts": ExpertsConfig(8, 2)}),
        ("qwen3_moe", {"head_dim": 12, "intermediate_size": 768, "experts": ExpertsConfig(128, 8, normalized=False)}),
        ("gpt_oss", {"head_dim": 64, "attention_bias": True, "output_bias": True, "mlp_bias": True, "sinks": True,
                     "window": 128, "windowed": (True, False) * 2, "rms_norm_eps": 1e-5,
                     "experts": ExpertsConfig(128, 4, router_bias=True)}),
    ],
)  # fmt: skip
def test_keys_that_a_config_leaves_out_have_their_familys_defaults(model_type, expected):
    sizes = {name: value for name, value in family_fields("llama").items() if name != "num_key_value_heads"}
    sizes |= {"num_attention_heads": 8, "hidden_size": 96, "num_hidden_layers": 4}  # as many heads as any family's default of kv heads
    config = config_from_huggingface({**sizes, "model_type": model_type})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "theta", "local"),
    [
        ("llama", 1e4, None),
        ("smollm3", 2e6, None),
        ("olmo3", 5e5, 5e5),
        ("gemma3_text", 1e6, 1e4),
        ("cohere", 5e5, None),
        ("mixtral", 1e6, None),
        ("gpt_oss", 1.5e5, None),
    ],
)
def test_default_bases_of_rope(model_type, theta, local):
    config = config_from_huggingface({**family_fields("llama"), "model_type": model_type})
    assert config.rope.theta == theta
    assert (None if config.local_rope is None else config.local_rope.theta) == local


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral", {"sliding_window": "x"}, "sliding_window is 'x'"),
        ("mistral", {"sliding_window": None, "layer_types": ["nonsense"] * 2}, "layer_types has 'nonsense'"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers is 'x'"),
        ("smollm3", {"no_rope_layers": [[1]] * 4}, "no_rope_layers is"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("granite", {"logits_scaling": "x"}, "logits_scaling is 'x'"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        ("gemma3_text", {"rope_local_base_freq": 0}, "rope_theta is 0"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {}, "other": {}}}, "rope_parameters has 'other'"),
        ("phi3 longrope", {"partial_rotary_factor": 1.0}, "short_factor has 3 numbers; expected .* 6 pairs"),
        ("exaone4", {"sliding_window_pattern": "GGGL"}, "sliding_window_pattern is 'GGGL'"),
        ("hunyuan_v1_dense", {"head_dim": 2}, "head_dim 2"),
        ("mixtral", {"num_experts_per_tok": 99}, "per_token is 99"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_a_familys_config_cannot_mean_is_refused(case, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(family_fields(case, **changes))


def test_a_window_that_is_asked_for_has_the_familys_size():
    config = config_from_huggingface(family_fields("qwen2", num_hidden_layers=4, use_sliding_window=True, max_window_layers=1))
    assert config.windowed == (False, True, True, True)
    assert config.window == 4096


def test_other_families_are_refused_by_name(tmp_path):
    fields = {**family_fields("llama"), "model_type": "mamba2"}
    folder = write_folder(tmp_path / "m", fields, {"x": np.zeros(1, np.float32)})
    listed = re.escape(", ".join(sorted(architectures.FAMILIES)))
    with pytest.raises(ValueError, match=f"'mamba2'; expected one of {listed}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_llama_class_takes_llamas_only(tmp_path):
    folder = write_folder(tmp_path / "m", family_fields("qwen3"))
    with pytest.raises(ValueError, match="holds a qwen3; expected a llama, or use AutoModelForCausalLM"):
        LlamaForCausalLM.from_pretrained(folder)


def test_configs_survive_being_written():
    for case in CASES:
        config = config_from_huggingface(family_fields(case))
        assert type(config).from_dict(jax.tree.map(lambda x: x, config.to_dict())) == config
