"""Read a PyTorch checkpoint in Hugging Face form: config.json, safetensors or .bin files.

Tensors are read one by one, so that a caller never holds more than it asked for. Nothing is ever
unpickled: .bin files go through torch's weights-only loader, and need torch installed.
"""

import functools
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from tqdm.auto import tqdm

from fireq_jax.json_files import read_json
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.config import ModelConfig

_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
# Buffers that old exports carry; RoPE is computed from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> ModelConfig:
    """The architecture in ``folder/config.json``.

    What ends a sequence is taken from ``generation_config.json`` where it says so: chat models
    list there the ids that end a turn.

    Raises:
        ValueError: if there is no such file or it does not describe a model of a family that is there.
    """
    return config_from_huggingface(_read_fields(folder))


def _read_fields(folder: Path) -> dict[str, Any]:
    """``config.json``, with the ids that end a sequence from generation_config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    fields = read_json(path)
    if (eos := read_generation_config(folder).get("eos_token_id")) is not None:
        fields["eos_token_id"] = eos
    return fields


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of a folder, {} without one.

    Raises:
        ValueError: naming the file, if it is not a JSON object.
    """
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


class HuggingFaceCheckpoint:
    """The tensors of a checkpoint folder, checked against its config when opened.

    Raises:
        ValueError: naming the first tensor that is missing, unexpected, of the wrong shape or
            not floating point, or the file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = _read_fields(folder)
        self.config = config_from_huggingface(fields)
        self._table = tensor_table(fields, self.config)
        self._file_of = _locate_tensors(folder)
        self._torch_file: tuple[Path, Mapping[str, Any]] | None = None
        self._check_names()

    @functools.cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        return self._table.shapes(self.config.num_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted(set(self._file_of.values()))

    def block(self, index: int) -> dict[str, np.ndarray]:
        """All tensors of block ``index``, in the form that ``models.block`` describes."""
        prefix = self._table.prefix.format(index=index)
        return {name: source.read(self.tensor(prefix + source.name)) for name, source in self._table.block.items()}

    def global_names(self) -> list[str]:
        """Names, as used here, of the tensors outside the blocks."""
        return list(self._table.outside)

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``: embeddings, final norm or (untied) head."""
        source = self._table.outside[name]
        return source.read(self.tensor(source.name))

    def tensor(self, name: str) -> np.ndarray:
        """One of the checkpoint's tensors, by its name there and in the dtype of the file."""
        path = self._file_of[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)
        if self._torch_file is None or self._torch_file[0] != path:
            self._torch_file = (path, _load_torch_file(path))
        return _torch_to_numpy(self._torch_file[1][name])

    def check_finite(self, *, progress: bool = True) -> None:
        """Read every tensor once; ValueError names the first with a NaN or an infinity, also of bfloat16."""
        names = list(self._expected)
        for name in tqdm(names, desc="checking tensors", unit="tensor", disable=not progress, leave=False):
            values = self.tensor(name)
            finite = np.isfinite(values)
            if values.dtype.itemsize > 2:
                finite &= np.abs(values) <= _LARGEST
            if not finite.all():
                where = np.unravel_index(int(np.argmin(finite)), values.shape)
                raise ValueError(
                    f"tensor {name} in {self._file_of[name]} holds {values[where]} at {tuple(map(int, where))}; "
                    "expected finite numbers"
                )

    def _check_names(self) -> None:
        expected = self._expected
        found = {name for name in self._file_of if not name.endswith(_IGNORED_SUFFIXES)}
        if self.config.tie_word_embeddings:
            found.discard("lm_head.weight")
        if missing := sorted(set(expected) - found):
            raise ValueError(
                f"{self.folder} lacks tensor {missing[0]}{_and_more(missing)}, which its config.json asks for"
            )
        if extra := sorted(found - set(expected)):
            raise ValueError(
                f"{self.folder} has unexpected tensor {extra[0]}{_and_more(extra)}; "
                f"no layer of a {self.config.model_type} takes it"
            )
        for path in sorted({self._file_of[name] for name in expected}):
            names = [name for name in expected if self._file_of[name] == path]
            for name, (shape, dtype) in self._describe(path, names).items():
                if shape != expected[name]:
                    raise ValueError(f"tensor {name} in {path} has shape {shape}; expected {expected[name]}")
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"tensor {name} in {path} has dtype {dtype}; expected a float of 16 bits or more")

    def _describe(self, path: Path, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in names}
                return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        tensors = _load_torch_file(path)
        for name in names:
            if not hasattr(tensors[name], "dtype"):
                raise ValueError(f"{name} in {path} is a {type(tensors[name]).__name__}; expected a tensor")
        dtypes = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
        found = {name: (tuple(tensors[name].shape), str(tensors[name].dtype)) for name in names}
        return {name: (shape, dtypes.get(dtype, dtype)) for name, (shape, dtype) in found.items()}


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from a single file or an index; safetensors come first, all as in transformers."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return dict.fromkeys(_names_in(single), single)
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map; expected tensor names and their files")
            if odd := [file for file in weight_map.values() if not isinstance(file, str)]:
                raise ValueError(f"{index} maps a tensor to {odd[0]!r}; expected the name of a file")
            files = {name: folder / file for name, file in weight_map.items()}
            for path in sorted(set(files.values())):
                if not path.is_file():
                    raise ValueError(f"{index} names {path.name}, which is not in {folder}")
            _check_index(index, files)
            return files
    raise ValueError(
        f"{folder} has no weights; expected model.safetensors, pytorch_model.bin, or one of them with an index"
    )


def _check_index(index: Path, files: Mapping[str, Path]) -> None:
    for path in sorted(set(files.values())):
        listed = {name for name, file in files.items() if file == path}
        if absent := sorted(listed - set(_names_in(path))):
            raise ValueError(f"{index} says that tensor {absent[0]} is in {path.name}, but it is not")


def _names_in(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_load_torch_file(path))
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _load_torch_file(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and torch is not installed; pip install 'fireq-jax[torch]', "
            "or convert the checkpoint to safetensors"
        ) from error
    try:
        # Files in the format of before torch 1.6 are not zip archives, and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read as plain PyTorch weights: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; expected tensors by name")
    return tensors


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()
