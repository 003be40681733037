"""Text in: documents from files, folders or ``datasets``, and one long stream of token ids.

What each kind of source holds:

- ``.jsonl``, ``.ndjson``, ``.json``: one JSON object a line, one document each, in its text field ("text" unless
  overridden);
- ``.parquet``: one document a row, in the column of that name; needs pyarrow;
- any other file (``.txt``, ``.md``, ...): one document;
- a folder: its ``.txt``, ``.jsonl``, ``.ndjson`` and ``.parquet`` files in the order of their names, not its
  subfolders;
- anything else: a data set of the ``datasets`` library, ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``
  (split "train" unless given); needs datasets.
"""

import importlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

_FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".txt")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
# Documents handed to the tokenizer at once: enough for its threads, few enough for memory.
_TOKENIZE_TOGETHER = 256


def read_documents(source: str | Path, *, text_field: str = "text") -> list[str]:
    """All documents of a text source, in a fixed order; empty ones are left out.

    Args:
        source: file, folder or data set, as the module describes.
        text_field: field of .jsonl objects, column of .parquet files and data sets.

    Raises:
        ValueError: if the source does not exist, is not UTF-8, lacks the text field or holds no text.
        ImportError: if reading it needs a package that is not installed; the message names it.
    """
    if not str(source):
        raise ValueError("the text source is ''; expected a file, a folder or the name of a data set")
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _FOLDER_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path}: the folder has no text; expected {', '.join(_FOLDER_SUFFIXES)} files in it")
        documents = [document for file in files for document in _read_file(file, text_field)]
    elif path.exists():
        documents = _read_file(path, text_field)
    else:
        documents = _read_dataset(str(source), text_field)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{source}: no text in it; expected at least one document that is not empty")
    return documents


def tokenize(documents: Iterable[str], tokenizer: Any) -> Int32[np.ndarray, " tokens"]:
    """Token ids of all documents, one after the other, as int32.

    Each document is tokenized by itself with the tokenizer's own special tokens, so that a
    tokenizer which starts a text with BOS marks where every document begins.

    Args:
        documents: texts, as :func:`read_documents` returns them.
        tokenizer: a transformers tokenizer.
    """
    rows: list[np.ndarray] = []
    pending = iter(documents)
    while batch := list(itertools.islice(pending, _TOKENIZE_TOGETHER)):
        # verbose=False: a document longer than the model's context is expected here.
        encoded = tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
        rows.extend(np.asarray(ids, np.int32) for ids in encoded)
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def load_tokens(source: str | Path, tokenizer: Any, *, text_field: str = "text") -> Int32[np.ndarray, " tokens"]:
    """:func:`tokenize` of :func:`read_documents`; raises what the latter raises."""
    return tokenize(read_documents(source, text_field=text_field), tokenizer)


def _read_file(path: Path, text_field: str) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, text_field)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; expected UTF-8 text"
        ) from error
    return _read_jsonl(path, text, text_field) if suffix in _JSON_LINES else [text]


def _read_jsonl(path: Path, text: str, text_field: str) -> list[str]:
    documents = []
    # Not splitlines(): it also splits at characters that JSON strings may contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; expected one JSON object a line") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(fields).__name__}; expected an object")
        documents.append(_text_of(fields, text_field, f"{path}, line {number}"))
    return documents


def _text_of(fields: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in fields:
        raise ValueError(f"{where}: no field {text_field!r}; it has {sorted(fields)}")
    if not isinstance(fields[text_field], str):
        raise ValueError(f"{where}: field {text_field!r} is {fields[text_field]!r:.40}; expected a string")
    try:
        fields[text_field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {text_field!r} is no Unicode text: {error}") from error
    return fields[text_field]


def _read_parquet(path: Path, text_field: str) -> list[str]:
    parquet: Any = _import_optional("pyarrow.parquet", f"{path}: reading .parquet files", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a .parquet file") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise ValueError(f"{path}: no column {text_field!r}; it has {sorted(names)}")
    try:
        column = file.read(columns=[text_field]).column(text_field).to_pylist()
    except OSError as error:
        raise ValueError(f"{path}: {error}; expected a .parquet file") from error
    return _strings(column, text_field, str(path))


def _read_dataset(name: str, text_field: str) -> list[str]:
    if Path(name).suffix.lower() in (*_FOLDER_SUFFIXES, *_JSON_LINES) or Path(name).is_absolute():
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
    if text_field not in dataset.column_names:
        raise ValueError(f"{name}: no column {text_field!r}; it has {sorted(dataset.column_names)}")
    return _strings(dataset[text_field], text_field, name)


def _strings(column: Sequence[Any], text_field: str, where: str) -> list[str]:
    for row, value in enumerate(column):
        if not isinstance(value, str):
            raise ValueError(f"{where}, row {row}: column {text_field!r} is {value!r:.40}; expected a string")
    return list(column)


def _import_optional(module: str, purpose: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}; install it with: pip install {package}") from error
