"""``fireq-generate`` on a random model of bytes, its text pieces, and tokenizer loading."""

import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fireq_jax import LlamaForCausalLM, ModelConfig, device_memory, generate
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.generation.command import main, pieces

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
PROMPT = "Once upon"
NEW = 10


BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without a chat template and generation config."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1}
    model = LlamaForCausalLM(ModelConfig(**sizes, num_heads=2, num_kv_heads=1, head_dim=16), dtype=jnp.float32)
    model.lm_head.set_value(model.lm_head.get_value() * 20)
    model.save(folder)
    BYTES.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture
def variant(folder, tmp_path):
    """A copy to put files into."""
    return shutil.copytree(folder, tmp_path / "variant")


def run(capsys, folder, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = main(["--model", str(folder), "--max-new-tokens", str(NEW), "--dtype", "float32", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def text_of(model, prompt: str, **options) -> str:
    ids = BYTES(prompt).input_ids
    sequence = generate(model, [ids], max_new_tokens=NEW, **options).sequences[0]
    return BYTES.decode(sequence[len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_a_reader_that_has_seen_enough_ends_the_command(folder, monkeypatch, options):
    """As in ``fireq-generate ... | head -c 1``."""
    arguments = ["--model", str(folder), "--max-new-tokens", str(NEW), "--dtype", "float32", "--prompt", PROMPT]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as text:
        monkeypatch.setattr(sys, "stdout", text)
        assert main(arguments + options) == 141
        print("more", flush=True)


def test_streamed_text_is_the_complete_text(capsys, folder, model):
    code, streamed, speed = run(capsys, folder, "--prompt", PROMPT)
    assert (code, streamed) == (0, text_of(model, PROMPT) + "\n")
    assert f"{folder}: read, and compiled for the prompt, in" in speed
    assert f"{len(PROMPT)} prompt tokens, {NEW} new ones" in speed
    assert "tokens/s" in speed
    assert run(capsys, folder, "--prompt", PROMPT, "--no-stream")[1] == streamed


def test_sampling_arguments_reach_the_model(capsys, folder, model):
    arguments = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01"]
    _, out, _ = run(capsys, folder, "--prompt", PROMPT, *arguments, "--repetition-penalty", "1.1", "--seed", "3")
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    assert out == text_of(model, PROMPT, key=jax.random.key(3), **options) + "\n"
    assert out != text_of(model, PROMPT, key=jax.random.key(4), **options) + "\n"


def test_json_lists_every_prompt_of_a_batch(capsys, folder, model):
    code, out, _ = run(capsys, folder, "--prompt", PROMPT, "--prompt", "é", "--json")
    assert code == 0
    assert json.loads(out) == [
        {"prompt": prompt, "text": text_of(model, prompt), "tokens": NEW, "finished": False} for prompt in (PROMPT, "é")
    ]


def test_several_prompts_are_printed_one_after_the_other(capsys, folder, model):
    out = run(capsys, folder, "--prompt", PROMPT, "--prompt", "b")[1]
    assert out == f"=== {PROMPT}\n{text_of(model, PROMPT)}\n=== b\n{text_of(model, 'b')}\n"


def test_chat_template_is_applied(capsys, variant, model):
    (variant / "chat_template.jinja").write_text(TEMPLATE)
    out = run(capsys, variant, "--prompt", "Hi", "--chat", "--system", "Be brief.", "--no-stream")[1]
    assert out == text_of(model, "[system]Be brief.[user]Hi[assistant]") + "\n"


def test_template_errors_are_reported(capsys, variant):
    (variant / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    code, _, err = run(capsys, variant, "--prompt", "Hi", "--chat")
    assert code == 2
    assert f"fireq-generate: {variant}: the chat template rejects the messages: no system role" in err


def test_generation_config_gives_defaults(capsys, variant, model):
    end = int(generate(model, [BYTES(PROMPT).input_ids], max_new_tokens=NEW).sequences[0, len(PROMPT) + 4])
    (variant / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end], "max_new_tokens": 20}))
    main(["--model", str(variant), "--dtype", "float32", "--prompt", PROMPT, "--json"])
    (result,) = json.loads(capsys.readouterr().out)
    assert result["finished"]
    assert result["tokens"] <= 5
    free = {"max_new_tokens": 20}
    (variant / "generation_config.json").write_text(json.dumps(free))
    main(["--model", str(variant), "--dtype", "float32", "--prompt", PROMPT, "--json"])
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == 20


def test_a_generation_config_s_max_length_counts_the_prompt(capsys, variant, model):
    (variant / "generation_config.json").write_text(json.dumps({"max_length": len(PROMPT) + 3}))
    assert main(["--model", str(variant), "--dtype", "float32", "--prompt", PROMPT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == 3
    code, out, err = run(capsys, variant, "--prompt", PROMPT, "--json")
    assert (code, json.loads(out)[0]["tokens"]) == (0, NEW)
    assert f"{variant}: a cache of 0.0 MB for {NEW} new tokens a prompt" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; expected 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["--prompt", ""], "prompt '' has no tokens"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "--seed is 99999999999999999999; expected"),
        (["--prompt", "a", "--implementation", "mosaic_gpu"], "Hopper"),
        (["--prompt", "a", "--chat"], "has no chat template; leave out --chat"),
        (["--prompt", "a", "--system", "b"], "--system is given without --chat"),
        (["--prompt", "a", "--revision", "main"], "revision is 'main', and "),
        (["--prompt", "a", "--max-new-tokens", "90000000"], "the cache of 1 x "),
    ],
)
def test_invalid_input_exits_with_2_and_a_message(capsys, monkeypatch, folder, arguments, message):
    monkeypatch.setattr(device_memory, "_room", lambda devices: 2**30)
    code, out, err = run(capsys, folder, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("fireq-generate: ")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("generation_config.json", "[1]", "generation_config.json holds a JSON list; expected an object"),
        ("tokenizer.json", "{}", "transformers cannot read its tokenizer"),
    ],
)
def test_broken_files_are_named(capsys, variant, name, content, message):
    (variant / name).write_text(content)
    code, _, err = run(capsys, variant, "--prompt", "a")
    assert code == 2
    assert str(variant) in err
    assert message in err


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"temperature": "0.6"}, "generation_config.json: temperature is '0.6'; expected a number"),
        ({"eos_token_id": 999}, "generation_config.json: eos_token_id is 999; expected ids from 0 to 257"),
    ],
)
def test_wrong_values_of_a_generation_config_are_quoted(capsys, variant, defaults, message):
    (variant / "generation_config.json").write_text(json.dumps(defaults))
    code, _, err = run(capsys, variant, "--prompt", "a")
    assert code == 2
    assert message in err


def test_options_without_effect_are_said(capsys, variant, caplog):
    options = {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "min_length": None}
    (variant / "generation_config.json").write_text(json.dumps(options))
    assert run(capsys, variant, "--prompt", "a")[0] == 0
    expected = f"{variant / 'generation_config.json'}: no_repeat_ngram_size, num_beams: without effect here"
    assert caplog.messages.count(expected) == 1


def test_a_prompt_that_is_no_text_is_quoted(capsys, folder):
    code, _, err = run(capsys, folder, "--prompt", "bad \udcff byte")
    assert code == 2
    assert r"prompt 'bad \udcff byte' is no Unicode text" in err


def test_a_bad_call_is_refused_before_the_model_is_read(capsys, folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "filled", None)
    assert main(["--model", str(folder), "--prompt", "a", "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens is 0" in capsys.readouterr().err


def test_a_prompt_beyond_the_positions_is_said_once(capsys, folder, caplog):
    assert main(["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "2040", "--dtype", "float32"]) == 0
    assert sum("positions; text beyond them may be poor" in message for message in caplog.messages) == 1


def test_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer; expected tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="absent is not a folder"):
        load_tokenizer(tmp_path / "absent")


def test_tokenizer_round_trip(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("naïve 猫").input_ids) == "naïve 猫"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: bytes for what the vocabulary lacks, put together again by the decoder."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate([*special, *"▁abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTE_FALLBACK = byte_fallback_tokenizer()


@pytest.mark.parametrize("tokenizer", [BYTES, BYTE_FALLBACK], ids=["bytes", "byte fallback"])
@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=12), text=st.text(max_size=12))
@example(prompt="the price is €€€", text="€ a")
@example(prompt="தமிழ்", text="நாடு a")
@example(prompt="한국어", text="는 a")
def test_pieces_join_to_the_text_and_split_no_character(tokenizer, prompt, text):
    tokens = tokenizer(text).input_ids
    parts = list(pieces(tokenizer, tokenizer(prompt).input_ids, iter(tokens)))
    assert "".join(parts) == text
    assert len(parts) == len(tokens) + 1
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_pieces_show_an_incomplete_character_at_the_end():
    tokens = BYTES("a猫").input_ids[:-1]
    assert list(pieces(BYTES, [], iter(tokens))) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_pieces_keep_the_space_that_a_tokenizer_drops_from_a_text_s_start():
    vocabulary = {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    assert tokenizer.decode([2]) == "cat"
    assert list(pieces(tokenizer, [0, 1], iter([2, 3, 2]))) == [" cat", "s", " cat", ""]
    # A special token leaves no text, and the space after it is kept.
    assert "".join(pieces(tokenizer, [0, 1], iter([2, 0, 2]))) == " cat cat"
    assert np.char.count("".join(pieces(tokenizer, [1] * 50, iter([2] * 50))), " cat") == 50
