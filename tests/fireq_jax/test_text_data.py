"""Documents from every kind of source, and their token stream."""

import copy
import gzip
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.text_data import load_tokens, read_documents, tokenize

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_llama"
DOCUMENTS = ["first document\r\nwith two lines", "zweites Dokument: äöü €", "third \u2028 and \f last"]


class ByteTokenizer:
    """BOS (256), then the UTF-8 bytes."""

    def __call__(self, texts, **_):
        return {"input_ids": [[256, *text.encode()] for text in texts]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")


def write_parquet(path, columns):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)


def test_jsonl_parquet_and_folder_hold_the_same_documents(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)])
    write_parquet(tmp_path / "rows.parquet", {"text": DOCUMENTS, "id": [0, 1, 2]})
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in reversed(list(enumerate(DOCUMENTS))):
        (folder / f"{i}.txt").write_bytes(text.encode())
    (folder / "ignored.bin").write_bytes(b"\xff\xff")
    (folder / "subfolder.txt").mkdir()
    for source in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet", folder, str(folder)):
        assert read_documents(source) == DOCUMENTS


@pytest.mark.parametrize("name", ["rows.ndjson", "c4-train.00000.json", "ROWS.JSONL"])
def test_json_lines_have_several_names(tmp_path, name):
    write_jsonl(tmp_path / name, [{"text": text} for text in DOCUMENTS])
    assert read_documents(tmp_path / name) == DOCUMENTS


def test_any_other_file_is_one_document(tmp_path):
    for name in ("plain.txt", "README.md", "no_suffix"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + DOCUMENTS[1].encode())
        assert read_documents(tmp_path / name) == [DOCUMENTS[1]]


def test_folder_mixes_kinds_in_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}])
    write_parquet(tmp_path / "c.parquet", {"text": ["three"]})
    assert read_documents(tmp_path) == ["one", "two", "three"]


def test_text_field_can_be_overridden(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": 1, "content": "right"}])
    write_parquet(tmp_path / "a.parquet", {"content": ["right"]})
    for name in ("a.jsonl", "a.parquet"):
        assert read_documents(tmp_path / name, text_field="content") == ["right"]


def test_stream_starts_every_document_with_bos(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    tokens = load_tokens(tmp_path / "a.jsonl", ByteTokenizer())
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [256, 97, 98, 256, 99])


def test_many_documents_keep_their_order():
    documents = [chr(97 + i % 26) * (i % 5 + 1) for i in range(600)]
    expected = [token for text in documents for token in (256, *text.encode())]
    np.testing.assert_array_equal(tokenize(documents, ByteTokenizer()), expected)


@pytest.fixture(scope="module")
def example_tokenizer():
    return load_tokenizer(EXAMPLE)


def test_the_example_models_tokenizer_adds_its_bos(example_tokenizer):
    long = "a word and another " * 2000  # beyond model_max_length, which must not warn
    tokens = tokenize(["Hello.", long], example_tokenizer)
    assert tokens[0] == example_tokenizer.bos_token_id
    assert np.count_nonzero(tokens == example_tokenizer.bos_token_id) == 2
    assert example_tokenizer.decode(tokens, skip_special_tokens=True) == "Hello." + long


def test_the_example_texts_are_long_enough_and_disjoint(example_tokenizer):
    texts = [read_documents(EXAMPLE / f"{name}.txt")[0] for name in ("calibration", "evaluation")]
    lengths = [len(tokenize([text], example_tokenizer)) for text in texts]
    assert lengths[0] > 32 * 512
    assert lengths[1] > 12 * 512
    paragraphs = [{line for line in text.splitlines() if len(line) > 40} for text in texts]
    assert not paragraphs[0] & paragraphs[1]


def test_arrays_and_compressed_files_hold_the_same_documents(tmp_path):
    rows = [{"text": text} for text in DOCUMENTS]
    (tmp_path / "rows.json").write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("rows.json", "rows.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (folder / "z.txt.gz").write_bytes(gzip.compress(b"text"))
    for source in (tmp_path / "rows.json", folder / "rows.json.gz", folder / "rows.jsonl.gz"):
        assert read_documents(source) == DOCUMENTS
    assert read_documents(folder) == [*DOCUMENTS, "text"]  # of a folder's JSON only lines


def test_joined_documents_are_one_text_with_its_empty_lines(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("", " = Title = \n", "", "words \n")])
    assert read_documents(tmp_path / "a.jsonl", join=True) == ["\n\n = Title = \n\n\n\n\nwords \n"]
    tokens = load_tokens(tmp_path / "a.jsonl", ByteTokenizer(), join=True)
    assert np.count_nonzero(tokens == 256) == 1
    write_jsonl(tmp_path / "chat.jsonl", [{"text": "a"}, {"messages": CONVERSATION}])
    with pytest.raises(ValueError, match=r"chat.jsonl: documents to be joined are conversations"):
        read_documents(tmp_path / "chat.jsonl", join=True)


CONVERSATION = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]


def test_conversations_become_text_by_the_chat_template(tmp_path, example_tokenizer):
    """With its special tokens alone, and nothing after the last message; among texts in order."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"messages": CONVERSATION}, {"text": "two"}, {"messages": []}])
    write_parquet(tmp_path / "a.parquet", {"messages": [CONVERSATION]})
    documents = read_documents(tmp_path / "a.jsonl")
    assert documents == ["one", CONVERSATION, "two"]
    assert read_documents(tmp_path / "a.parquet") == [CONVERSATION]
    assert read_documents(tmp_path / "a.jsonl", text_field="text") == documents
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: no field 'chat'"):
        read_documents(tmp_path / "a.jsonl", text_field="chat")
    tokenizer = copy.deepcopy(example_tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokens = tokenize(documents, tokenizer)
    bos = tokenizer.bos_token
    assert tokenizer.decode(tokens) == f"{bos}one{bos}<user>Hi?<assistant>Ho.{bos}two"
    with pytest.raises(ValueError, match="a conversation: the chat template rejects the messages"):
        tokenize(documents, example_tokenizer)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("array.json", b'[{"text": "a"}, 3]', r"array.json, entry 2: a JSON int; expected an object"),
        ("broken.json", b'[{"text": "a"}, ', r"broken.json: .*expected one JSON array of objects, or an object a line"),
        ("half.txt.gz", gzip.compress(b"text" * 99)[:20], r"half.txt.gz: .*expected a file that gzip compressed"),
        ("plain.txt.gz", b"text", r"plain.txt.gz: .*expected a file that gzip compressed"),
        (
            "role.jsonl",
            b'{"messages": [{"role": "user"}]}',
            r"'messages' has \{'role': 'user'\}; expected messages",
        ),
        ("parts.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}', r"a role and a content, strings"),
        ("chat.jsonl", b'{"messages": 3}', "field 'messages' is 3; expected a string, or a list of messages"),
        ("latin.txt", b"caf\xe9 noir", r"latin.txt: not UTF-8: byte 0xe9 at offset 3; expected UTF-8"),
        ("empty.txt", b"", r"empty.txt: no text in it"),
        ("blank.txt", b" \n\n", r"blank.txt: no text in it"),
        ("empty.jsonl", b"\n", r"empty.jsonl: no text in it"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', r"broken.jsonl, line 2: .*expected one JSON object a line"),
        ("list.jsonl", b'["a"]\n', r"list.jsonl, line 1: a JSON list; expected an object"),
        ("field.jsonl", b'{"b": "x", "a": 1}\n', r"field.jsonl, line 1: no field 'text'; it has \['a', 'b'\]"),
        ("type.jsonl", b'{"text": null}\n', r"type.jsonl, line 1: field 'text' is None; expected a string"),
        ("deep.jsonl", b"[" * 100_000, r"deep.jsonl, line 1: .*expected one JSON object a line"),
        ("half.jsonl", b'{"text": "\\ud800"}', r"half.jsonl, line 1: field 'text' is no Unicode text"),
        ("broken.parquet", b"PAR1 is not enough", r"broken.parquet: .*expected a .parquet file"),
    ],
)
def test_bad_files_are_errors_with_their_path(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_bad_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "text_": ["y"]})
    with pytest.raises(ValueError, match=r"a.parquet: no column 'text'; it has \['body', 'text_'\]"):
        read_documents(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", {"text": ["x", None]})
    with pytest.raises(ValueError, match=r"b.parquet, row 1: column 'text' is None; expected a string"):
        read_documents(tmp_path / "b.parquet")


def test_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone.txt: no such file; expected a text file, a folder"):
        read_documents(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"the folder has no text; expected .jsonl, .ndjson, .parquet, .txt files"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="the text source is ''"):
        read_documents("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"some/name: no such file or folder; .* pip install datasets"):
        read_documents("some/name")


def test_parquet_without_pyarrow_says_how_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"a.parquet: reading .parquet files needs pyarrow; .* pip install pyarrow"):
        read_documents(tmp_path / "a.parquet")


def test_dataset_names(monkeypatch):
    class Column(dict):
        column_names = property(lambda self: list(self))

    def load_dataset(name, config, *, split):
        if name != "owner/known":
            raise FileNotFoundError(f"data set {name} not found")
        return Column(text=[f"{config} {split}"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_documents("owner/known") == ["None train"]
    assert read_documents("owner/known:raw:test") == ["raw test"]
    with pytest.raises(ValueError, match=r"owner/known: no column 'body'; it has \['text'\]"):
        read_documents("owner/known", text_field="body")
    with pytest.raises(ValueError, match=r"unknown: neither a file, nor a folder, nor a data set: data set unknown"):
        read_documents("unknown")
    with pytest.raises(ValueError, match=r"expected a file, a folder, or a data set as NAME"):
        read_documents("a:b:c:d")
