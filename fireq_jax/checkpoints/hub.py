"""Models by name: local folders and GGUF files, and repositories of the Hugging Face hub, which are downloaded.

Where downloads are kept, tokens and ``HF_HUB_OFFLINE`` are the ``huggingface_hub`` library's.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fireq_jax.checkpoints.folder import MANIFEST, check_finished, read_manifest
from fireq_jax.checkpoints.gguf_file import find_gguf
from fireq_jax.checkpoints.huggingface import GENERATION_CONFIG
from fireq_jax.checkpoints.quantized import FORMAT_FILES
from fireq_jax.checkpoints.reader import checkpoint_config

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# What says whether a model can be loaded, in a few kilobytes.
_CONFIGS = (*FORMAT_FILES, GENERATION_CONFIG, MANIFEST)
# Beside the weights: configs, tokenizers, chat templates, and the card, which has the license.
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")


def check_config(folder: Path) -> None:
    """Raise ValueError unless a folder's config files, or a GGUF file, describe a model that can be loaded."""
    check_finished(folder)
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
    else:
        checkpoint_config(folder)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is no local path, nor that of a GGUF file, and has the form of ``owner/model``."""
    return not (Path(name).exists() or name.endswith(".gguf")) and _HUB_ID.fullmatch(name) is not None


def resolve_model(name: str, revision: str | None = None, *, check: Callable[[Path], None] = check_config) -> Path:
    """The folder or GGUF file of a model: ``name`` itself, or where that hub id is downloaded to.

    Args:
        name: a folder, a GGUF file, or a hub id ``owner/model`` of a Hugging Face checkpoint or a converted model.
        revision: the hub's branch, tag or commit; None means its default branch.
        check: raises ValueError for a folder of config files whose model is not wanted. It is called before
            weights are downloaded.

    Raises:
        ValueError: naming ``name``, if it is neither, if ``revision`` is given for a folder, or if the download
            fails; and what ``check`` raises.
    """
    path = Path(name)
    if name and (path.is_dir() or find_gguf(path)):
        if revision is not None:
            kind = "folder" if path.is_dir() else "file"
            raise ValueError(f"revision is {revision!r}, and {name} is a {kind}; only hub ids have revisions")
        check(path)
        return path
    folder = resolve_config(name, revision, check=check)
    if (folder / MANIFEST).is_file():
        return _download(name, revision, (*_COMPANIONS, "*.npz", "params/*"))
    # Repositories hold other formats and sizes of the same model in subfolders.
    folder = _download(name, revision, (*_COMPANIONS, "*.safetensors"), ignore=("*/*",))
    if not any(folder.glob("*.safetensors")):
        folder = _download(name, revision, (*_COMPANIONS, "pytorch_model*.bin"), ignore=("*/*",))
    return folder


def resolve_config(name: str, revision: str | None = None, *, check: Callable[[Path], None] = check_config) -> Path:
    """The folder of a hub id's config files alone, as :func:`resolve_model` downloads them first."""
    if not is_hub_id(name):
        raise ValueError(
            f"model is {name!r}; expected an existing folder or a hub id such as 'owner/model', or a GGUF file"
        )
    folder = _download(name, revision, _CONFIGS)
    try:
        check(folder)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return folder


def _download(name: str, revision: str | None, patterns: Sequence[str], *, ignore: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignore))
    except Exception as error:  # of the library's, of HTTP's and of the disk's: many kinds
        at = "" if revision is None else f" at revision {revision!r}"
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r}{at} is not a folder and could not be downloaded: {reason}") from error
    return Path(folder)
