"""generation_config.json: what has an effect, what is said to have none, and what is refused."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from fireq_jax.generation.defaults import GenerationDefaults
from fireq_jax.generation.sampling import SamplingConfig

IGNORED = {
    "top_h": 0.4,
    "num_beams": 4,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": [8, 1.1],
    "encoder_no_repeat_ngram_size": 3,
    "watermarking_config": {"bias": 2.0},
    "remove_invalid_values": True,
    "max_time": 0.5,
    "force_words_ids": [[5]],
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "min_length": 4,
    "an_option_of_next_year": 1,
}


def read(folder: Path, fields: dict) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return GenerationDefaults.read(folder)


def test_every_key_without_effect_is_named(tmp_path):
    assert read(tmp_path, IGNORED).ignored == tuple(sorted(IGNORED))


def test_what_changes_nothing_is_not(tmp_path):
    """transformers' own defaults, spelled out, and what a saved file says about itself."""
    plain = {
        name: value
        for name, value in GenerationConfig._get_default_generation_params().items()
        if name not in ("temperature", "top_k", "top_p", "repetition_penalty", "max_length")
    }
    saved = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, use_cache=False).to_dict()
    empty = {"bad_words_ids": [], "sequence_bias": {}, "an_option_of_next_year": None, "another": False}
    assert read(tmp_path, {**saved, **plain, **empty}).ignored == ()
    assert GenerationDefaults.read(tmp_path / "no such folder").ignored == ()


@pytest.mark.parametrize(
    ("defaults", "given", "expected"),
    [
        ({}, {}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}, {}),
        ({"do_sample": False, "top_k": 5, "repetition_penalty": 1.2}, {}, {"repetition_penalty": 1.2}),
        ({"do_sample": True, "top_p": 0.9}, {}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0}, {}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": None, "top_p": 0.9, "top_k": None},
            {},
            {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        ),
        ({"do_sample": True, "top_k": 50}, {"top_k": 0, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
    ],
)
def test_given_options_come_before_those_of_the_file(tmp_path, defaults, given, expected):
    given = {**dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty")), **given}
    options = read(tmp_path, defaults).sampling(given)
    assert {name: value for name, value in options.items() if value is not None} == expected


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({}, None), ({"max_length": 8}, 5), ({"max_new_tokens": 7}, 7), ({"max_length": 8, "max_new_tokens": 7}, 7)],
)
def test_new_tokens_after_a_prompt_of_three(tmp_path, fields, tokens):
    assert read(tmp_path, fields).new_tokens(3) == tokens


def test_a_prompt_that_fills_max_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"generation_config\.json: max_length is 8, and the prompt has 8 tokens"):
        read(tmp_path, {"max_length": 8}).new_tokens(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id is '2'; expected a whole number"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \(1, None\); expected a whole number"),
        ({"eos_token_id": {"a": [1]}}, r"eos_token_id is \{'a': \[1\]\}"),
        ({"temperature": [0.5]}, r"temperature is \[0.5\]; expected a number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected true or false"),
        ({"do_sample": True, "temperature": 10**400}, "'temperature' is inf"),
        ({"do_sample": True, "top_p": 2}, "top_p is 2; expected a number in"),
        ({"do_sample": True, "temperature": float("nan")}, "'temperature' is nan"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a positive number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 to"),
        ({"max_length": 10**30}, "max_length is 1000000"),
    ],
)
def test_wrong_values_name_the_file_and_the_key(tmp_path, fields, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}/generation_config\.json.*: {message}"):
        read(tmp_path, fields)


def test_ids_beyond_the_vocabulary_name_the_file(tmp_path):
    defaults = read(tmp_path, {"eos_token_id": [2, 7]})
    defaults.check_vocabulary(8)
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id is \(2, 7\); expected ids from 0 to 6"):
        defaults.check_vocabulary(7)


def test_huge_numbers_are_refused_as_options_too():
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        with pytest.raises(ValueError, match=f"{name} is 1000"):
            SamplingConfig(**{name: 10**400})
