"""GGUF files: metadata and tensors, of one file or of a model that was split into several.

The header is read here rather than with the ``gguf`` package, whose reader makes several arrays for each of a
vocabulary's strings and takes seconds for it; the package knows the types of tensors, and decodes them.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from fireq_jax.config_fields import is_a, quote

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where a file does not say
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# By the number that a file gives of a value's type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that a path to a model stands for, of a split model the first part; None for another model.

    That is the file itself, or the only one in a folder without a config.json and without a converted model.

    Raises:
        ValueError: if the folder holds several models, or the first part is not there.
    """
    if model.is_file():
        return _first_part(model) if model.suffix.lower() == ".gguf" or _has_magic(model) else None
    if not model.is_dir() or any((model / name).exists() for name in ("config.json", "fireq.json", "params")):
        return None
    # Beside a model there may be the projector of its images.
    files = [path for path in sorted(model.glob("*.gguf")) if not path.name.startswith("mmproj")]
    models = list(dict.fromkeys(map(_first_part, files)))
    if len(models) > 1:
        raise ValueError(f"{model} holds {len(models)} GGUF models, {models[0].name} and others; give one of the files")
    return models[0] if models else None


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _first_part(path: Path) -> Path:
    if (part := _PART.fullmatch(path.name)) is None:
        return path
    first = path.with_name(f"{part[1]}-00001-of-{part[3]}.gguf")
    if not first.is_file():
        raise ValueError(f"{first} is missing; expected beside {path.name}, which is a part of the same model")
    return first


def gguf_package() -> ModuleType:
    """The ``gguf`` package.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the gguf package; pip install 'fireq-jax[gguf]'") from error
    return gguf


class GGUFTensor(NamedTuple):
    """Where a tensor is, and what.

    Attributes:
        path: its file.
        name: in the file.
        shape: in elements, rows first (a file has them last).
        kind: "F32", "Q4_K" ..., as the ``gguf`` package calls it.
        start, nbytes: of its bytes in the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        """Whether it has to be decoded."""
        return self.kind not in _FLOATS

    def read(self) -> np.ndarray:
        """The tensor: floats of 16 bits or more as they are, all else as float32."""
        octets = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.start)
        if octets.size != self.nbytes:
            raise ValueError(f"{self.path} is not a readable GGUF file: it ends inside tensor {self.name}")
        if not self.quantized:
            return octets.view(_FLOATS[self.kind]).reshape(self.shape)
        gguf = gguf_package()
        rows = octets.reshape(math.prod(self.shape[:-1]), -1)
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[self.kind]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file, or a model in several of them, says and holds.

    Attributes:
        path: of the file, or the first part.
        metadata: values by key, of the first part. Float32 as the shortest decimal that rounds to it, as it was in
            the config that the file was made of.
        tensors: by name, of all parts.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the headers.

        Raises:
            ValueError: naming the file, and the tensor, of what is damaged, missing or of an unknown type.
        """
        metadata, tensors = _read_header(path)
        count = metadata.get("split.count", 1)
        if not is_a(count, int):
            raise ValueError(f"{path}: split.count is {quote(count)}; expected a whole number")
        part = _PART.fullmatch(path.name)
        if (1 if part is None else int(part[3])) != max(count, 1):
            raise ValueError(f"{path} is one of {count} parts; expected names such as NAME-00001-of-{count:05}.gguf")
        for number in range(2, count + 1):
            other = path.with_name(f"{part[1]}-{number:05}-of-{part[3]}.gguf") if part else path
            if not other.is_file():
                raise ValueError(f"{other} is missing; {path.name} is the first of {count} parts")
            more = _read_header(other)[1]
            if twice := sorted(set(more) & set(tensors)):
                raise ValueError(f"tensor {twice[0]} is in {other} and in {tensors[twice[0]].path.name}")
            tensors |= more
        return cls(path, metadata, tensors)


class _Cursor:
    """Reads a header's values one after another."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"{self.path} is not a readable GGUF file: it ends inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        form = f"<{count}{kind}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        # A vocabulary may have a part of a character alone.
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(kind, 1)[0]
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING:
            return self.scalars(kind, count)
        return [self.string() for _ in range(count)]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} has a value of type {kind}; expected {', '.join(map(str, _SCALARS))}")
        if count > len(self.data):
            self.take(count)
        values = self.numbers(_SCALARS[kind], count)
        return [float(str(np.float32(value))) for value in values] if _SCALARS[kind] == "f" else list(values)


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    path = cursor.path
    cursor.take(len(_MAGIC))
    if (version := cursor.number("I")) not in _VERSIONS:
        raise ValueError(
            f"{path} is GGUF version {version}; expected {' or '.join(map(str, _VERSIONS))}, little-endian"
        )
    tensor_count, value_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{path} has {quote(key)} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(tensor_count):
        name, axes = cursor.string(), cursor.number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name} in {path} has {axes} axes; expected at most {_MOST_AXES}")
        entries.append((name, cursor.numbers("Q", axes)[::-1], cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not is_a(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {quote(alignment)}; expected a positive whole number")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"{path} has tensor {name} twice")
        tensors[name] = tensor = _tensor(path, name, shape, kind, start + offset)
        if tensor.start + tensor.nbytes > len(cursor.data):
            raise ValueError(f"{path} is not a readable GGUF file: it ends inside tensor {name}")
    return metadata, tensors


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
    gguf = gguf_package()
    if kind not in set(gguf.GGMLQuantizationType):
        raise ValueError(f"tensor {name} in {path} has type {kind}, which the gguf package does not know")
    known = gguf.GGMLQuantizationType(kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[known]
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} in {path} has shape {shape}; expected rows of whole blocks of {block}")
    return GGUFTensor(path, name, shape, known.name, start, math.prod(shape) // block * nbytes)


def check_decodable(tensor: GGUFTensor) -> None:
    """Raise ValueError, naming the tensor, if the ``gguf`` package cannot turn it into floats."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[tensor.kind]
    try:
        if tensor.quantized:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(f"tensor {tensor.name} in {tensor.path} has type {tensor.kind}: {error}") from error
