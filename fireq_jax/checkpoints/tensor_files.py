"""Tensors in safetensors and PyTorch files: what a file holds, then its tensors one by one.

Nothing is ever unpickled: PyTorch's files go through torch's weights-only loader, and need torch installed.
"""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from fireq_jax.config_fields import quote

# As safetensors spell them.
_TORCH_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class StoredTensor(NamedTuple):
    """Where a tensor is, and what: its file, its name there, its shape, and its dtype ("F32", "BF16" ...)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a PyTorch file (whatever else its name ends in), by name.

    Raises:
        ValueError: naming the file, if it is damaged, or a PyTorch file with anything but plain tensors.
    """
    if path.suffix != ".safetensors":
        tensors = _load_torch_file(path)
        dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        return {
            name: StoredTensor(path, name, tuple(tensor.shape), _TORCH_DTYPES.get(dtypes[name], dtypes[name]))
            for name, tensor in tensors.items()
        }
    with _safetensors(path) as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        return {
            name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
        }


class TensorReader:
    """Reads tensors; of PyTorch files, which are opened as a whole, it keeps the last one."""

    def __init__(self) -> None:
        self._torch_file: tuple[Path, Mapping[str, Any]] | None = None

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, in the dtype of the file."""
        path, name = tensor.path, tensor.name
        if path.suffix == ".safetensors":
            with _safetensors(path) as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        if self._torch_file is None or self._torch_file[0] != path:
            self._torch_file = (path, _load_torch_file(path))
        values = self._torch_file[1][name]
        return _torch_to_numpy(values if rows is None else values[rows])


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except Exception as error:  # safetensors has its own, and passes on others
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
        reason = str(error).partition("\n")[0]  # advice follows, to load it and run its code
        raise ValueError(f"{path} cannot be read as plain PyTorch weights: {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; expected tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} holds something under the key {quote(name)}; expected tensors by name")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} in {path} is a {type(tensor).__name__}; expected a tensor")
        plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        if not plain:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "meta"
            kind = kind if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} in {path} is a {kind} tensor; expected a plain one")
    return tensors


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
