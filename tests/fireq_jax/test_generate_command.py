"""``fireq-generate`` on a random model of bytes, its text pieces, and tokenizer loading."""

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator

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
from fireq_jax.generation import TextStream
from fireq_jax.generation.command import main
from fireq_jax.generation.prompts import Prompt, read_prompts
from fireq_jax.generation.terminal import Answer, run_chat

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


def pieces(tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text of each token, and what is left at the end."""
    text = TextStream(tokenizer, prompt)
    yield from map(text.push, tokens)
    yield text.finish()


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


def test_texts_end_where_they_are_told_to(capsys, variant, model):
    """Before a stop string, which is not printed, streamed or not; after a further EOS id; or as the file says."""
    # Letters alone: what a random model makes of other bytes is no text.
    words = [[token] for token in range(258) if not 34 <= token < 60]
    (variant / "generation_config.json").write_text(json.dumps({"bad_words_ids": words}))
    ids = BYTES(PROMPT).input_ids
    tokens = generate(model, [ids], max_new_tokens=NEW, bad_words_ids=words).sequences[0, len(ids) :].tolist()
    text, stop = BYTES.decode(tokens), BYTES.decode(tokens[4:6])
    expected = text[: text.index(stop)] + "\n"
    assert run(capsys, variant, "--prompt", PROMPT, "--stop", "nothing", "--stop", stop)[1] == expected
    assert run(capsys, variant, "--prompt", PROMPT, "--stop", stop, "--no-stream")[1] == expected
    count = 1 + tokens.index(tokens[5])
    (ended,) = json.loads(run(capsys, variant, "--prompt", PROMPT, "--eos-token-id", str(tokens[5]), "--json")[1])
    assert ended == {"prompt": PROMPT, "text": text[:count], "tokens": count, "finished": True}
    (variant / "generation_config.json").write_text(json.dumps({"bad_words_ids": words, "stop_strings": stop}))
    assert run(capsys, variant, "--prompt", PROMPT)[1] == expected


def test_a_file_of_prompts_is_answered_line_by_line(capsys, variant, model, monkeypatch, tmp_path):
    (variant / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": PROMPT}, {"messages": messages}, {"prompt": "b"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    texts = [text_of(model, prompt) for prompt in (PROMPT, "[system]Be brief.[user]Hi[assistant]", "b")]
    arguments = ["--system", "Be brief.", "--batch-size", "2", "--json"]
    code, out, _ = run(capsys, variant, "--prompts", str(file), *arguments)
    assert code == 0
    expected = [
        {**line, "text": text, "tokens": NEW, "finished": False} for line, text in zip(lines, texts, strict=True)
    ]
    assert [json.loads(line) for line in out.splitlines()] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nb\n"))
    assert run(capsys, variant, "--prompts", "-")[1] == f"=== {PROMPT}\n{texts[0]}\n=== b\n{texts[2]}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON"),
        pytest.param("[" * 200_000, "expected JSON", id="deep"),
        ("[1]", "expected an object with either prompt or messages"),
        ('{"text": "a"}', "expected an object with either prompt or messages"),
        ('{"prompt": 3}', "expected a text as prompt"),
        ('{"messages": []}', "expected a text as prompt, or a role"),
        ('{"messages": [{"role": "user"}]}', "expected a text as prompt, or a role"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"{file}:3 is .*; {message}"):
        read_prompts(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(str(file))
    # Windows' editors begin UTF-8 with a byte order mark.
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert read_prompts(str(file))[0].given == "a"


def test_messages_without_a_chat_template_are_named():
    messages = Prompt(({"role": "user", "content": "a"},), "line 2")
    with pytest.raises(ValueError, match="model has no chat template; line 2 has messages"):
        messages.encoded(BYTES, "model", chat=False, system=None)


def test_a_chat_in_the_terminal_remembers_what_was_said(capsys, variant, model, monkeypatch):
    (variant / "chat_template.jinja").write_text(TEMPLATE)
    lines = ["Hi", "/nothing", "", "/system Be kind.", "Yes", "/reset", "Hi", "/exit", "Never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(capsys, variant, "--chat", "--system", "Be brief.")
    first = text_of(model, "[system]Be brief.[user]Hi[assistant]")
    second = text_of(model, f"[system]Be kind.[user]Hi[assistant]{first}[user]Yes[assistant]")
    third = text_of(model, "[system]Be kind.[user]Hi[assistant]")
    assert (code, out) == (0, f"{first}\n{second}\n{third}\n")
    assert "/nothing is unknown: /reset" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 2100))
    code, out, err = run(capsys, variant, "--chat")
    assert (code, out) == (0, "")
    assert "the chat has 2117 tokens, and the model 2048 positions; /reset it" in err


def test_ctrl_c_stops_an_answer_and_a_second_one_the_chat(monkeypatch):
    class Fake:
        messages, system = [], None

        def answer(self, text, enough):
            heard.append((text, enough()))
            for _ in range(int(text)):
                signal.raise_signal(signal.SIGINT)
            heard.append(enough())
            return Answer("", [3], [0.0, 1.0], None)

    heard, reported = [], []
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n0\n2\n0\n"))
    with pytest.raises(KeyboardInterrupt):
        run_chat(Fake(), reported.append)
    assert heard == [("1", False), True, ("0", False), False, ("2", False)]
    assert len(reported) == 2
    assert signal.getsignal(signal.SIGINT) is before


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
    assert re.search(rf"{variant}: a cache of 0\.0[1-9] MB for {NEW} new tokens a prompt", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; expected 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["--prompt", ""], "prompt '' has no tokens"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "--seed is 99999999999999999999; expected"),
        (["--prompt", "a", "--implementation", "mosaic_gpu"], "Hopper"),
        (["--prompt", "a", "--chat"], "has no chat template; leave out --chat"),
        (["--prompt", "a", "--system", "b"], "--system is given without --chat, and no prompt has messages"),
        (["--prompt", "a", "--revision", "main"], "revision is 'main', and "),
        (["--prompt", "a", "--max-new-tokens", "90000000"], "the cache of 1 x "),
        ([], "nothing is asked: give --prompt, --prompts, or --chat"),
        (["--prompt", "a", "--prompts", "b.txt"], "--prompt and --prompts b.txt are given; expected one of them"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--chat", "--json"], "--json is given, and a chat in the terminal has none"),
        (["--chat"], "has no chat template; leave out --chat"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["--prompt", "a", "--stop", ""], "stop_strings is ['']; expected a text that is not empty"),
        (["--prompt", "a", "--eos-token-id", "300"], "eos_token_ids is (300,); expected ids from 0 to 257"),
        (["--prompt", "a", "--device", "gpu:7"], "device is 'gpu:7'; expected one of cpu:0 (cpu)"),
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
        ({"bad_words_ids": [[5, 258]]}, "generation_config.json: bad_words_ids is ((5, 258),); expected ids from 0"),
        ({"bad_words_ids": [5]}, "generation_config.json: bad_words_ids is (5,); expected lists of token ids"),
        ({"stop_strings": [3]}, "generation_config.json: stop_strings is (3,); expected texts that are not empty"),
        ({"min_new_tokens": -3}, "generation_config.json: min_new_tokens is -3; expected 0 to"),
    ],
)
def test_wrong_values_of_a_generation_config_are_quoted(capsys, variant, defaults, message):
    (variant / "generation_config.json").write_text(json.dumps(defaults))
    code, _, err = run(capsys, variant, "--prompt", "a")
    assert code == 2
    assert message in err


def test_options_without_effect_are_said(capsys, variant, caplog):
    options = {"num_beams": 4, "min_length": 3, "typical_p": 1.0, "top_h": None}
    (variant / "generation_config.json").write_text(json.dumps(options))
    assert run(capsys, variant, "--prompt", "a")[0] == 0
    expected = f"{variant / 'generation_config.json'}: min_length, num_beams: without effect here"
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
