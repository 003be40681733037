"""Files that are there as a whole or not at all, and how it is told later that they are the same."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO


def write_whole(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Let ``save`` write aside, then rename: the file is never half there.

    Raises:
        OSError: naming the file.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with _named(aside, "written"), aside.open("wb") as file:
            save(file)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder: of the names of the files in it, below it, and what they hold.

    Hashing lets other threads run. One core does about 1 GB/s where it has instructions for SHA-256, else half.

    Raises:
        OSError: naming the file that is missing or cannot be read.
    """
    if not path.is_dir():
        with _named(path, "read"), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((os.fsencode(file.relative_to(path)), file) for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for name, file in files:
        total.update(name + b"\0" + digest(file).encode())
    return total.hexdigest()


def check_digest(path: Path, expected: str, advice: str) -> None:
    """Raise ValueError, with ``advice``, unless :func:`digest` of ``path`` is still as ``expected``."""
    if not path.exists():
        raise ValueError(f"{path} is missing; expected SHA-256 {expected:.12}...; {advice}")
    if (found := digest(path)) != expected:
        raise ValueError(f"{path} has changed: its SHA-256 is {found:.12}..., expected {expected:.12}...; {advice}")


def check_digests(folder: Path, expected: Mapping[str, str], advice: str) -> None:
    """:func:`check_digest` of everything that ``expected`` names below ``folder``."""
    for name, sha256 in expected.items():
        check_digest(folder / name, sha256, advice)


@contextlib.contextmanager
def _named(path: Path, verb: str) -> Iterator[None]:
    """Have errors name the file: those of a full disk do not, and numpy's have no number either."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be {verb}: {error}") from error
