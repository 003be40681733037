"""Tokenizers, as transformers reads them from a model's folder, or made of what a GGUF file says."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fireq_jax.checkpoints.gguf_file import GGUFFile, find_gguf
from fireq_jax.checkpoints.gguf_tokenizer import gguf_tokenizer, has_tokenizer
from fireq_jax.checkpoints.huggingface import GENERATION_CONFIG
from fireq_jax.checkpoints.transformers_import import import_transformers
from fireq_jax.whole_files import check_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of the first three there must be; the others are what transformers also looks at.
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TOKENIZER_FILES = (
    *_FILES, "config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


_MORE_TEMPLATES = "additional_chat_templates"  # a folder of them, which converted models do not have


def load_tokenizer(folder: str | Path, *, verify: bool = True) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``folder``; only local files are read and no code in them is run.

    Args:
        folder: a Hugging Face checkpoint or a converted model; or a GGUF file.
        verify: of a converted one, that the tokenizer's files are those that came with the model; those that
            were added to a model without a tokenizer are taken as they are.

    Raises:
        ValueError: naming the folder or the file, if it has no tokenizer, another than it had, or one that
            transformers cannot read or use.
    """
    # With Orbax, as the model's own loading.
    from fireq_jax.checkpoints.folder import MANIFEST, check_finished

    folder = Path(folder)
    if (file := find_gguf(folder)) is not None:
        return _used(gguf_tokenizer(GGUFFile.open(file)), file)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model with its tokenizer")
    check_finished(folder)
    if verify and (folder / MANIFEST).is_file():
        _verify(folder)
    if not any((folder / name).is_file() for name in _FILES):
        raise ValueError(f"{folder} has no tokenizer; expected {', '.join(_FILES[:-1])} or {_FILES[-1]}")
    auto = import_transformers().AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
    return _used(tokenizer, folder)


def _used(tokenizer: "PreTrainedTokenizerBase", model: Path) -> "PreTrainedTokenizerBase":
    """The same; some of what its files may have wrong shows only when it is used."""
    try:
        tokenizer.decode(tokenizer("a").input_ids)
    except Exception as error:
        raise ValueError(f"{model}: transformers cannot read its tokenizer: {error}") from error
    return tokenizer


@contextlib.contextmanager
def companion_files(model: Path) -> Iterator[dict[str, Path]]:
    """What goes along with a model's weights, by name: what its tokenizer is made of, and its generation config.

    The tokenizer's files are the folder's own, or those of a GGUF file, which are made for as long as they are needed.

    Raises:
        ValueError: as :func:`load_tokenizer`, for a GGUF file that describes a tokenizer.
    """
    with contextlib.ExitStack() as stack:
        folder = model
        if (file := find_gguf(model)) is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if has_tokenizer(GGUFFile.open(file)):
                load_tokenizer(file).save_pretrained(folder)
        paths = [model / GENERATION_CONFIG, *(folder / name for name in TOKENIZER_FILES)]
        yield {path.name: path for path in paths if path.is_file()}


def _verify(folder: Path) -> None:
    """Raise ValueError unless what the tokenizer is made of is what the manifest lists."""
    from fireq_jax.checkpoints.folder import UNVERIFIED, read_manifest

    digests = read_manifest(folder).digests or {}
    if not any(name in digests for name in TOKENIZER_FILES):
        return
    for name in (*TOKENIZER_FILES, _MORE_TEMPLATES):
        if name in digests:
            check_digest(folder / name, digests[name], UNVERIFIED)
        elif (folder / name).exists():
            raise ValueError(f"{folder / name} is not of the tokenizer that was converted; remove it, or {UNVERIFIED}")
