"""A Hugging Face hub of local folders."""

import fnmatch
import shutil
from pathlib import Path


class Hub:
    """A hub of local folders in place of the library's download."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, Path] = {}
        self.calls: list[tuple[str, str | None, list[str]]] = []

    def download(self, name, *, revision=None, allow_patterns, ignore_patterns):
        source = self.repositories.get(name)
        if source is None:
            raise OSError(f"404 Client Error.\n\nRepository Not Found: {name}")
        target = self.cache / name.replace("/", "--")
        fetched = []
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            file = path.relative_to(source).as_posix()
            wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / file)
                fetched.append(file)
        target.mkdir(parents=True, exist_ok=True)
        self.calls.append((name, revision, fetched))
        return str(target)

    @property
    def fetched(self) -> set[str]:
        return {file for _, _, files in self.calls for file in files}
