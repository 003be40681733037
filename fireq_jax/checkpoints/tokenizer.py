"""Tokenizers, as transformers reads them from a model's folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from fireq_jax.checkpoints.folder import check_finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``folder``; only local files are read and no code in them is run.

    Raises:
        ValueError: naming the folder, if it has no tokenizer or one that transformers cannot read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model with its tokenizer")
    check_finished(folder)
    if not any((folder / name).is_file() for name in _FILES):
        raise ValueError(f"{folder} has no tokenizer; expected {', '.join(_FILES[:-1])} or {_FILES[-1]}")
    # Importing transformers takes seconds, which a caller without text should not pay.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
