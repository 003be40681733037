"""The output folder while a conversion writes to it, and ``OUTPUT/.conversion`` in it, from which it is resumed::

    lock                    held by the process that converts; the kernel lets go of it when that ends
    options.json            what must not change between an interrupted run and its continuation
    fitted_cache.json       the cache format that text asks for, and what each one costs
    hidden.N.npy ...        calibration text's hidden states that enter block N: all files that end in ``.N.npy``
    smoothing.N.npz         what smoothing did in block N
    globals.json            digests of what is outside the blocks, once it is all there
    block.N.json            block N's part of the report, and digests of what it wrote, once it is all there

A resumed run goes on only from what these digests describe.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from fireq_jax.checkpoints import folder
from fireq_jax.json_files import read_json, read_sealed, write_json, write_sealed
from fireq_jax.whole_files import check_digests, digest, write_whole

REPORT = "report.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """What an interrupted conversion into ``output`` needs to go on.

    Attributes:
        output: the folder that is to hold the converted model.
    """

    output: Path

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.output / folder.WORK_FOLDER

    def check(self, options: Mapping[str, Any] | None, *, resume: bool) -> bool:
        """Whether the output is already complete; writes nothing. None: ``options`` do not matter.

        Raises:
            ValueError: if ``output`` cannot be written to or holds something else: a file, another model, a
                conversion of other ``options``, one that another process is at or one that is not to be resumed.
        """
        output = self.output
        folder.check_writable(output)
        if output.is_symlink() and not output.exists():
            raise ValueError(f"{output} is a link to {output.readlink()}, which is not there; expected a folder")
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is not a folder; give another output folder")
        for path in (self.path, output / "params"):
            if path.is_symlink():
                raise ValueError(f"{path} is a link; expected what a conversion made: remove it")
        if self._lock_path.exists():
            self._lock().close()
        return self._check_contents(options, resume=resume)

    @contextlib.contextmanager
    def begun(self, options: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Hold the lock, with ``options`` written; removes all again at a ValueError before the first block's end."""
        existed = self.output.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if self._check_contents(options, resume=resume):
                raise ValueError(f"another process has converted into {self.output}")
            fresh = self._is_fresh()
            try:
                write_json(self._options, options)
                yield
            except ValueError:
                if fresh and self.record(0) is None:
                    self._discard(existed)
                raise

    def finished_blocks(self, num_layers: int) -> int:
        """How many blocks are finished, -1 if not even what is outside them is; what is there is verified.

        Raises:
            ValueError: naming a file that is missing or has changed since.
        """
        records = [self.record(index) for index in range(-1, num_layers)]
        first = next((place for place, record in enumerate(records) if record is None), len(records))
        if any(records[first:]):
            raise ValueError(f"{self._record_path(first - 1)} is missing, but later ones are there; {self._advice}")
        for record in records[:first]:
            assert record is not None
            check_digests(self.output, record["sha256"], self._advice)
            if record is records[first - 1]:  # what entered earlier blocks is gone
                check_digests(self.output, record["next"], self._advice)
        return first - 1

    def finish(self, index: int, parts: Mapping[str, str], report: Mapping[str, Any]) -> None:
        """Record that block ``index`` is finished, or with -1 what is outside the blocks; remove what entered it.

        Args:
            index: number of the block.
            parts: digests of its committed parts, by path in ``output``.
            report: its part of the report.
        """
        made = {self._name(path): digest(path) for path in self.path.glob(f"*.{index}.npz")}
        following = {self._name(path): digest(path) for path in self._entering(index + 1)}
        record = {"report": dict(report), "sha256": {**parts, **made}, "next": following}
        write_sealed(self._record_path(index), record)
        for path in self._entering(index):
            path.unlink()

    def record(self, index: int) -> dict[str, Any] | None:
        """``report``, ``sha256`` and ``next`` that :meth:`finish` recorded; None if it has not."""
        path = self._record_path(index)
        return read_sealed(path, self._advice) if path.exists() else None

    def hidden(self, index: int) -> Path:
        """float32 [samples, T, D]: hidden states that enter block ``index``."""
        return self.path / f"hidden.{index}.npy"

    def quantized_hidden(self, index: int) -> Path:
        """The same in the quantized model."""
        return self.path / f"quantized_hidden.{index}.npy"

    def held_out(self, index: int) -> Path:
        """float32 [3, windows, T, D]: the same of held-out windows, in each of ``held_out.Streams``."""
        return self.path / f"held_out.{index}.npy"

    @property
    def fitted_cache(self) -> Path:
        """``kv_format`` and ``divergence``, what ``cache_format.fit_cache`` found."""
        return self.path / "fitted_cache.json"

    def smoothing(self, index: int) -> Path:
        """What ``smoothing_effect`` gave for block ``index``."""
        return self.path / f"smoothing.{index}.npz"

    def remove(self) -> None:
        """Remove the folder, of a complete model; what resists is left to the next ``--resume``."""
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _options(self) -> Path:
        return self.path / "options.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def _advice(self) -> str:
        return f"remove {self.output} and convert again"

    def _record_path(self, index: int) -> Path:
        return self.path / ("globals.json" if index < 0 else f"block.{index}.json")

    def _name(self, path: Path) -> str:
        return path.relative_to(self.output).as_posix()

    def _entering(self, index: int) -> list[Path]:
        return sorted(self.path.glob(f"*.{index}.npy"))

    def _check_contents(self, options: Mapping[str, Any] | None, *, resume: bool) -> bool:
        output = self.output
        if (output / folder.MANIFEST).exists():
            if not resume:
                raise ValueError(f"{output} already holds a complete model; give another output folder or remove it")
            before = read_json(output / REPORT) if (output / REPORT).is_file() else {}
            self._check_options(output / REPORT, before.get("options"), options)
            return True
        if not output.exists() or self._is_fresh():
            return False
        if not self._options.is_file():
            raise ValueError(f"{output} is not empty and not an interrupted conversion; give another output folder")
        if not resume:
            raise ValueError(f"{output} holds an interrupted conversion; use --resume to go on, or remove it")
        self._check_options(self._options, read_json(self._options), options)
        return False

    def _is_fresh(self) -> bool:
        """Whether there is nothing in the output but what is there before the options are."""
        before = {self._lock_path, self._options.with_name(self._options.name + ".tmp")}
        inside = set(self.path.iterdir()) if self.path.exists() else set()
        return set(self.output.iterdir()) <= {self.path} and inside <= before

    def _check_options(self, path: Path, before: Any, now: Mapping[str, Any] | None) -> None:
        if now is None:
            return
        if not isinstance(before, dict):
            raise ValueError(f"{path} does not say what {self.output} was made of; {self._advice}")
        if before != (now := json.loads(json.dumps(now))):
            raise ValueError(f"cannot resume {self.output}: {_difference('', before, now)}")

    def _lock(self) -> IO[bytes]:
        """The lock, held until it is closed."""
        while True:
            file = self._lock_path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise ValueError(f"another process is converting into {self.output}; give another folder") from error
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise OSError(f"{self._lock_path} cannot be locked: {error}") from error
                logger.warning("%s: no locks there (%s): run one conversion at a time", self._lock_path, error)
            # Its last holder may have removed it after it was opened here.
            if self._lock_path.exists() and os.path.samestat(os.fstat(file.fileno()), self._lock_path.stat()):
                return file
            file.close()

    def _discard(self, existed: bool) -> None:
        for path in (self.path, self.output / "params"):
            shutil.rmtree(path, ignore_errors=True)
        if not existed:
            self.output.rmdir()


def save_array(path: Path, array: np.ndarray) -> None:
    """``np.save``, whole or not at all."""
    write_whole(path, lambda file: np.save(file, array))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """``np.savez``, whole or not at all."""
    write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def _difference(name: str, was: Any, now: Any) -> str:
    """Of two unequal values, or of the first unequal ones in two objects."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in {**now, **was} if was.get(key) != now.get(key))
        return _difference(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    if name in ("calibration", "held_out"):
        return "the calibration text, the number or length of its samples, or the seed is another"
    return f"{name} was {was!r} and is now {now!r}"
