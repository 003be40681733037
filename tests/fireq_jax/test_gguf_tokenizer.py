"""The tokenizer in a GGUF file's metadata gives the tokens of the one that the file was made of."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TINY, write_gguf
from tiny_llama import weights_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import AutoModelForCausalLM, recipes
from fireq_jax.checkpoints.gguf_tokenizer import _LLAMA3, _SPLITTINGS
from fireq_jax.checkpoints.tokenizer import load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello world, it's 1234567 o'clock: I'LL be there!\n\n  def f(x):\n\treturn x  # done \n",
    "  two spaces, é and é, 漢字, 🙂 and \u200b",
    "<|im_start|>user\nHi<|im_end|>\nA b<|im_end|> c",
    "",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hello 12 \u00e9"}, {"role": "assistant", "content": "it's"}]


def byte_level(name: str) -> Tokenizer:
    """A small BPE whose words are cut as ``tokenizer.ggml.pre`` says."""
    digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS] + ["1234567 it's Hello world 漢字"] * 5, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    said = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(merge) for merge in model["merges"]],
        "token_type": [3 if token in SPECIAL else 1 for token in tokens], "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, "padding_token_id": None, **more,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()} | {"tokenizer.chat_template": TEMPLATE}


def write_model(path: Path, said: Mapping[str, Any], family: str = "llama") -> dict[str, Any]:
    size = len(said.get("tokenizer.ggml.tokens") or [0] * 67)
    fields = {"model_type": family, **TINY, "vocab_size": size, "num_hidden_layers": 1}
    write_gguf(path, fields, weights_of(fields), said=said)
    return fields


def assert_alike(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS) -> None:
    for text in texts:
        ids = one(text).input_ids
        assert ids == two(text).input_ids, text
        for skip in (True, False):
            assert one.decode(ids, skip_special_tokens=skip) == two.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["gpt-2", "smollm"])
def test_byte_level_tokens_are_the_same(tmp_path: Path, name: str) -> None:
    original = byte_level(name)
    write_model(tmp_path / "model.gguf", metadata_of(original, name))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=original, bos_token=SPECIAL[1], eos_token=SPECIAL[2], unk_token=SPECIAL[0],
        clean_up_tokenization_spaces=False, chat_template=TEMPLATE,
    )  # fmt: skip
    ours = load_tokenizer(tmp_path / "model.gguf")
    assert_alike(ours, theirs)
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == (*SPECIAL[1:], SPECIAL[0], None)
    assert ours.apply_chat_template(CHAT, tokenize=False) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert len(ours) == len(theirs)


def test_digits_alone_make_a_difference() -> None:
    """Or the test above would be none."""
    assert len(byte_level("gpt-2").encode("1234567").ids) < len(byte_level("smollm").encode("1234567").ids) == 7


def test_qwen_s_words_are_those_of_transformers(tmp_path: Path) -> None:
    model = json.loads(byte_level("smollm").to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
    write_model(tmp_path / "model.gguf", metadata_of(byte_level("smollm"), "qwen2"), "qwen2")
    assert_alike(load_tokenizer(tmp_path / "model.gguf"), theirs)


def words(name: str, text: str) -> list[str]:
    from tokenizers import Regex

    pattern = _SPLITTINGS[name].pattern
    assert pattern is not None
    return [word for word, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


def test_words_of_other_models() -> None:
    assert words("llama-bpe", "It'S 12345 a.b\n\n x") == ["It", "'S", " ", "123", "45", " a", ".b", "\n\n", " x"]
    assert words("qwen2", "12 ab") == ["1", "2", " ab"]
    assert words("tekken", "HelloWorld 12 it's //\n") == ["Hello", "World", " ", "1", "2", " it", "'s", " //\n"]


def test_llama_3_begins_with_bos_and_keeps_whole_words(tmp_path: Path) -> None:
    said = metadata_of(byte_level("gpt-2"), "llama-bpe")
    # A token that no merges lead to.
    said["tokenizer.ggml.tokens"] = [*said["tokenizer.ggml.tokens"], "zqzq"]
    said["tokenizer.ggml.token_type"] = [*said["tokenizer.ggml.token_type"], 1]
    write_model(tmp_path / "model.gguf", said)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer("zqzq").input_ids == [1, len(tokenizer) - 1]
    assert tokenizer("a", "b").input_ids == [1, *tokenizer("a", add_special_tokens=False).input_ids,
                                             1, *tokenizer("b", add_special_tokens=False).input_ids]  # fmt: skip
    write_model(tmp_path / "model.gguf", {**said, "tokenizer.ggml.add_bos_token": False,
                                          "tokenizer.ggml.add_eos_token": True})  # fmt: skip
    assert load_tokenizer(tmp_path / "model.gguf")("zqzq").input_ids == [len(tokenizer) - 1, 2]
    assert _LLAMA3.whole_words


def test_tokens_of_users_are_whole_and_unused_ones_are_none(tmp_path: Path) -> None:
    said = metadata_of(byte_level("gpt-2"), "gpt-2")
    count = len(said["tokenizer.ggml.tokens"])
    said["tokenizer.ggml.tokens"] = [*said["tokenizer.ggml.tokens"], "<think>", "[PAD7]"]
    said["tokenizer.ggml.token_type"] = [*said["tokenizer.ggml.token_type"], 4, 5]
    write_model(tmp_path / "model.gguf", said)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    ids = tokenizer("<think>[PAD7]").input_ids
    assert ids[0] == count
    assert count + 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>[PAD7]"


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as a SentencePiece model of kind BPE has them: later merges have lower scores."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS[:1] * 5, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merged = [left + right for left, right in json.loads(trained.to_str())["model"]["merges"]]
    letters = [token for token in sorted(trained.get_vocab()) if len(token) == 1]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{octet:02X}>" for octet in range(256))]
    scores = [0.0] * len(first) + [-float(index) for index in range(len(merged) + len(letters))]
    return [*first, *merged, *letters], scores, [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters))


def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    tokens, scores, kinds = sentencepiece()
    said = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "bos_token_id": 1,
            "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip
    path = tmp_path / "model.gguf"
    write_model(path, {f"tokenizer.ggml.{key}": value for key, value in said.items()})
    ours = load_tokenizer(path)
    ranks = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token, kind in zip(tokens, kinds, strict=True)
        for cut in range(1, len(token))
        if kind == 1 and token[:cut] in ranks and token[cut:] in ranks
    ]
    theirs = LlamaTokenizer(vocab=ranks, merges=merges)
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # Text that begins with a space is another in the newer of Llama's two forms.
    assert_alike(ours, theirs, ["Hello world", "it's 12 of 漢字 🙂\n", TEXTS[0]])
    text = "Hello world"
    assert ours(text).input_ids[0] == 1
    assert len(ours(text).input_ids) < len(text)
    assert ours.decode(ours("  a").input_ids, skip_special_tokens=True) == "  a"


def test_a_converted_model_has_the_tokenizer(tmp_path: Path) -> None:
    path, output = tmp_path / "model.gguf", tmp_path / "converted"
    fields = write_model(path, metadata_of(byte_level("smollm"), "smollm"))
    report = convert(ConversionOptions(path, output, "none", recipes.none()), None, progress=False)
    assert report["model"] == str(path)
    path.unlink()
    assert_alike(load_tokenizer(output), PreTrainedTokenizerFast(tokenizer_object=byte_level("smollm")))
    assert load_tokenizer(output).chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.eos_token_ids == (2,)
    assert model.config.vocab_size == fields["vocab_size"]


def test_a_model_without_a_tokenizer_is_converted_as_it_is(tmp_path: Path) -> None:
    path, output = tmp_path / "model.gguf", tmp_path / "converted"
    write_model(path, {})
    convert(ConversionOptions(path, output, "none", recipes.none()), None, progress=False)
    assert not list(output.glob("tokenizer*"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is None; expected 'gpt2' or 'llama'"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"pre": "jais"}, r"tokenizer\.ggml\.pre is 'jais'; expected one of gpt-2, smollm"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is None"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["a b c"]}, r"tokenizer\.ggml\.merges has 'a b c'; expected two parts"),
        ({"merges": ["a qqq"]}, "tokens and merges make no tokenizer: .*qqq"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type is \[1\]; expected a list of \d+, one for each token"),
        ({"token_type": 1}, r"tokenizer\.ggml\.token_type is 1; expected a list"),
        ({"bos_token_id": 10**6}, r"tokenizer\.ggml\.bos_token_id is 1000000; expected 0 to "),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    path, output = tmp_path / "model.gguf", tmp_path / "converted"
    write_model(
        path, {**metadata_of(byte_level("gpt-2"), "gpt-2"), **{f"tokenizer.ggml.{key}": said[key] for key in said}}
    )
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        convert(ConversionOptions(path, output, "none", recipes.none()), None, progress=False)
    assert not output.exists()


def test_torch_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model.gguf", metadata_of(byte_level("gpt-2"), "gpt-2"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert load_tokenizer(tmp_path)("Hello").input_ids
