"""Text in: documents from files, folders or ``datasets``, and one long stream of token ids.

What each kind of source holds:

- ``.jsonl``, ``.ndjson``: one JSON object a line, one document each, in its text field ("text" unless overridden); or,
  where it has none, in its "messages";
- ``.json``: the same, or one array of such objects;
- ``.parquet``: one document a row, in the column of that name; needs pyarrow;
- any other file (``.txt``, ``.md``, ...): one document;
- any of these but parquet with ``.gz`` after it: the same, compressed;
- a folder: its ``.txt``, ``.jsonl``, ``.ndjson`` and ``.parquet`` files, compressed ones too, in the order of their
  names, not its subfolders;
- anything else: a data set of the ``datasets`` library, ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``
  (split "train" unless given); needs datasets.

A document is a text, or a conversation: a list of messages, objects with "role" and "content", which become text by the
tokenizer's chat template when they are tokenized.
"""

import gzip
import importlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from fireq_jax.config_fields import quote
from fireq_jax.generation.chat import render

Conversation = list[dict[str, Any]]
Document = str | Conversation

_FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".txt")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TEXT, _MESSAGES = "text", "messages"
# Documents handed to the tokenizer at once: enough for its threads, few enough for memory.
_TOKENIZE_TOGETHER = 256


def read_documents(source: str | Path, *, text_field: str = _TEXT, join: bool = False) -> list[Document]:
    """All documents of a text source, in a fixed order; empty ones are left out.

    Args:
        source: file, folder or data set, as the module describes.
        text_field: field of JSON objects, column of .parquet files and data sets.
        join: make one document of all, empty ones too, with a blank line between any two: how perplexity on WikiText,
            whose documents are lines, is measured by convention.

    Raises:
        ValueError: if the source does not exist, is not UTF-8, lacks the text field, holds no text, or has
            conversations that were to be joined.
        ImportError: if reading it needs a package that is not installed; the message names it.
    """
    if not str(source):
        raise ValueError("the text source is ''; expected a file, a folder or the name of a data set")
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _kind(file) in _FOLDER_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path}: the folder has no text; expected {', '.join(_FOLDER_SUFFIXES)} files in it")
        documents = [document for file in files for document in _read_file(file, text_field)]
    elif path.exists():
        documents = _read_file(path, text_field)
    else:
        documents = _read_dataset(str(source), text_field)
    if join:
        documents = [_joined(documents, str(source))]
    documents = [document for document in documents if (document.strip() if isinstance(document, str) else document)]
    if not documents:
        raise ValueError(f"{source}: no text in it; expected at least one document that is not empty")
    return documents


def tokenize(documents: Iterable[Document], tokenizer: Any) -> Int32[np.ndarray, " tokens"]:
    """Token ids of all documents, one after the other, as int32.

    Each document is tokenized by itself with the tokenizer's own special tokens, so that a
    tokenizer which starts a text with BOS marks where every document begins; a conversation with those of its chat
    template alone.

    Args:
        documents: as :func:`read_documents` returns them.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: for conversations that its chat template rejects, or if it has none.
    """
    rows: list[np.ndarray] = []
    pending = iter(documents)
    while batch := list(itertools.islice(pending, _TOKENIZE_TOGETHER)):
        for is_text, group in itertools.groupby(batch, key=lambda document: isinstance(document, str)):
            rows.extend(np.asarray(ids, np.int32) for ids in _encoded(list(group), tokenizer, is_text=is_text))
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def load_tokens(
    source: str | Path, tokenizer: Any, *, text_field: str = _TEXT, join: bool = False
) -> Int32[np.ndarray, " tokens"]:
    """:func:`tokenize` of :func:`read_documents`; raises what these raise."""
    return tokenize(read_documents(source, text_field=text_field, join=join), tokenizer)


def protocol(*, join: bool) -> str:
    """How a text becomes tokens, for people who compare numbers."""
    if join:
        return "all documents joined by blank lines, empty ones too, and tokenized as one text"
    return "each document tokenized by itself, one after the other, without empty ones"


def _encoded(documents: Sequence[Document], tokenizer: Any, *, is_text: bool) -> list[Sequence[int]]:
    """Token ids of each, of texts or of conversations."""
    # verbose=False: a document longer than the model's context is expected here.
    encode = {"return_attention_mask": False, "verbose": False}
    if is_text:
        return tokenizer(list(documents), **encode)["input_ids"]
    texts = [
        render(tokenizer, document, "a conversation", ask=False)
        for document in documents
        if not isinstance(document, str)
    ]
    return tokenizer(texts, add_special_tokens=False, **encode)["input_ids"]


def _joined(documents: Sequence[Document], source: str) -> str:
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise ValueError(f"{source}: documents to be joined are conversations; expected texts")
    return "\n\n".join(texts)


def _kind(path: Path) -> str:
    """A file's suffix, but for that of compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def _read_file(path: Path, text_field: str) -> list[Document]:
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, text_field)
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {error}; expected a file that gzip compressed") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; expected UTF-8 text"
        ) from error
    if kind not in _JSON_LINES:
        return [text]
    is_array = kind == ".json" and text.lstrip().startswith("[")
    entries = _array_entries(path, text) if is_array else _line_entries(path, text)
    return [_document_of(fields, text_field, where) for where, fields in entries]


def _array_entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array, and where they are."""
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected one JSON array of objects, or an object a line") from error
    for number, fields in enumerate(entries, start=1):
        yield f"{path}, entry {number}", fields


def _line_entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """What the lines of a file hold, and where they are."""
    # Not splitlines(): it also splits at characters that JSON strings may contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; expected one JSON object a line") from error


def _document_of(fields: Any, text_field: str, where: str) -> Document:
    """The document of a JSON object."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a JSON {type(fields).__name__}; expected an object")
    name = _field_among(fields, text_field)
    if name is None:
        raise ValueError(f"{where}: no field {text_field!r}; it has {sorted(fields)}")
    return _document(fields[name], f"{where}: field {name!r}")


def _field_among(names: Iterable[str], text_field: str) -> str | None:
    """The one to read: without a text of the usual name, messages."""
    names = list(names)
    return next((name for name in (text_field, *[_MESSAGES] * (text_field == _TEXT)) if name in names), None)


def _document(value: Any, where: str) -> Document:
    """A text, or the messages of a conversation."""
    if isinstance(value, str):
        return _unicode(value, where)
    if not isinstance(value, list | np.ndarray):
        raise ValueError(f"{where} is {value!r:.40}; expected a string, or a list of messages")
    for message in value:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where} has {quote(message)}; expected messages with a role and a content, strings")
        for part in parts:
            _unicode(str(part), where)
    return list(value)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is no Unicode text: {error}") from error
    return text


def _read_parquet(path: Path, text_field: str) -> list[Document]:
    parquet: Any = _import_optional("pyarrow.parquet", f"{path}: reading .parquet files", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a .parquet file") from error
    names = file.schema_arrow.names
    name = _field_among(names, text_field)
    if name is None:
        raise ValueError(f"{path}: no column {text_field!r}; it has {sorted(names)}")
    try:
        column = file.read(columns=[name]).column(name).to_pylist()
    except OSError as error:
        raise ValueError(f"{path}: {error}; expected a .parquet file") from error
    return _column_documents(column, name, str(path))


def _read_dataset(name: str, text_field: str) -> list[Document]:
    if _kind(Path(name)) in (*_FOLDER_SUFFIXES, *_JSON_LINES) or Path(name).is_absolute():
        raise ValueError(f"{name}: no such file; expected a text file, a folder of them or the name of a data set")
    datasets: Any = _import_optional(
        "datasets", f"{name}: no such file or folder; reading it as the name of a data set", "datasets"
    )
    parts = name.split(":")
    if len(parts) > 3:
        raise ValueError(f"{name}: expected a file, a folder, or a data set as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    name, config, split = parts + [""] * (3 - len(parts))
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: neither a file, nor a folder, nor a data set: {error}") from error
    column = _field_among(dataset.column_names, text_field)
    if column is None:
        raise ValueError(f"{name}: no column {text_field!r}; it has {sorted(dataset.column_names)}")
    return _column_documents(dataset[column], column, name)


def _column_documents(column: Sequence[Any], name: str, where: str) -> list[Document]:
    return [_document(value, f"{where}, row {row}: column {name!r}") for row, value in enumerate(column)]


def _import_optional(module: str, purpose: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}; install it with: pip install {package}") from error
