"""A tokenizer is the one that came with the model, and one that works."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from fireq_jax import recipes
from fireq_jax.checkpoints.folder import write_manifest
from fireq_jax.checkpoints.tokenizer import TOKENIZER_FILES, load_tokenizer
from fireq_jax.checkpoints.transformers_import import import_transformers
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.whole_files import digest

SOURCE = Path(__file__).parents[2] / "examples" / "tiny_llama"
NAMES = {path.name for path in SOURCE.iterdir()} & set(TOKENIZER_FILES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copy(SOURCE / name, tmp_path)
    return tmp_path


@pytest.fixture
def converted(folder: Path) -> Path:
    config = config_from_huggingface(json.loads((SOURCE / "config.json").read_text()))
    write_manifest(folder, config, recipes.fireq(), {name: digest(folder / name) for name in NAMES})
    return folder


def test_an_unchanged_tokenizer_loads(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids) == "<s>Once upon a time"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_changed_tokenizer_is_refused_unless_nothing_is_verified(converted: Path, name: str) -> None:
    path = converted / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=rf"{path} has changed: .*--no-verify"):
        load_tokenizer(converted)
    load_tokenizer(converted, verify=False)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing"):
        load_tokenizer(converted)


def test_a_file_that_came_later_is_refused(converted: Path) -> None:
    (converted / "added_tokens.json").write_text('{"<new>": 4096}')
    with pytest.raises(ValueError, match=r"added_tokens\.json is not of the tokenizer that was converted"):
        load_tokenizer(converted)


def test_a_tokenizer_that_is_given_to_a_model_without_one_is_taken(folder: Path) -> None:
    config = config_from_huggingface(json.loads((SOURCE / "config.json").read_text()))
    write_manifest(folder, config, recipes.fireq(), {"params/norm": "0" * 64})
    load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_length": [2048]},
        {"model_max_length": "long"},
        {"tokenizer_class": 3},
        {"bos_token": 3},
        {"added_tokens_decoder": {"a": 1}},
    ],
)
def test_settings_that_transformers_stumbles_over_name_the_folder(folder: Path, change: dict) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{folder}: transformers cannot read its tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}"])
def test_a_broken_tokenizer_names_the_folder(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder}: transformers cannot read its tokenizer"):
        load_tokenizer(folder)


def test_transformers_does_not_ask_for_torch(tmp_path, monkeypatch, caplog):
    lines = "PyTorch was not found. Models won't be available.", "something else"
    (tmp_path / "transformers.py").write_text(
        f"import logging\nfor line in {lines!r}:\n    logging.getLogger('transformers').warning(line)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    del sys.modules["transformers"]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "propagate", False)
    import_transformers()
    logger.removeHandler(caplog.handler)
    assert caplog.messages == ["something else"]
