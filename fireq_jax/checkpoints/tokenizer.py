"""Tokenizers, as transformers reads them from a model's folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from fireq_jax.checkpoints.folder import MANIFEST, UNVERIFIED, check_finished, read_manifest
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
        folder: a Hugging Face checkpoint or a converted model.
        verify: of a converted one, that the tokenizer's files are those that came with the model; those that
            were added to a model without a tokenizer are taken as they are.

    Raises:
        ValueError: naming the folder or the file, if it has no tokenizer, another than it had, or one that
            transformers cannot read or use.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model with its tokenizer")
    check_finished(folder)
    if verify and (folder / MANIFEST).is_file():
        _verify(folder)
    if not any((folder / name).is_file() for name in _FILES):
        raise ValueError(f"{folder} has no tokenizer; expected {', '.join(_FILES[:-1])} or {_FILES[-1]}")
    # Importing transformers takes seconds, which a caller without text should not pay.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Some of what its files may have wrong shows only when it is used.
        tokenizer.decode(tokenizer("a").input_ids)
    except Exception as error:
        raise ValueError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
    return tokenizer


def _verify(folder: Path) -> None:
    """Raise ValueError unless what the tokenizer is made of is what the manifest lists."""
    digests = read_manifest(folder).digests or {}
    if not any(name in digests for name in TOKENIZER_FILES):
        return
    for name in (*TOKENIZER_FILES, _MORE_TEMPLATES):
        if name in digests:
            check_digest(folder / name, digests[name], UNVERIFIED)
        elif (folder / name).exists():
            raise ValueError(f"{folder / name} is not of the tokenizer that was converted; remove it, or {UNVERIFIED}")
