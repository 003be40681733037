"""Read a PyTorch checkpoint in Hugging Face form: config.json, safetensors or .bin files.

Tensors are read one by one, so that a caller never holds more than it asked for.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm.auto import tqdm

from fireq_jax.checkpoints.quantized import StoredLinear, quantized_format
from fireq_jax.checkpoints.storage import CACHE_SCALES, UNUSED
from fireq_jax.checkpoints.tensor_files import StoredTensor, TensorReader, tensors_in
from fireq_jax.config_fields import quote
from fireq_jax.json_files import errors_name, is_file, read_json
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.block import linears_of
from fireq_jax.models.coded_weight import CodedKind, CodedWeight, as_float
from fireq_jax.models.config import ModelConfig, eos_ids
from fireq_jax.models.family import HEAD
from fireq_jax.models.tensor_source import TensorTable

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What a checkpoint of the model without its head leaves out of its names.
_MODEL_PREFIX = "model."
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
_FLOATS = ("F64", "F32", "F16", "BF16")
# Whose buffers old exports carry; RoPE is computed from the config.
_ROTARY_MODULE = "rotary_emb"
GENERATION_CONFIG = "generation_config.json"
_COMPARED_BYTES = 2**24  # of each of two tensors at a time


def read_config(folder: Path) -> ModelConfig:
    """The architecture in ``folder/config.json``.

    What ends a sequence is taken from ``generation_config.json`` where it says so: chat models
    list there the ids that end a turn.

    Raises:
        ValueError: if there is no such file or it does not describe a model of a family that is here.
    """
    fields, config = _read_fields_and_config(folder)
    quantized_format(folder, fields)
    return config


def _read_fields_and_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    path = folder / "config.json"
    if not is_file(path):
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    fields = read_json(path)
    eos = read_generation_config(folder).get("eos_token_id")
    if eos is not None:
        fields.pop("eos_token_id", None)
    with errors_name(path):
        config = config_from_huggingface(fields)
    with errors_name(folder / GENERATION_CONFIG):
        return fields, config if eos is None else dataclasses.replace(config, eos_token_ids=eos_ids(eos))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of a folder, {} without one.

    Raises:
        ValueError: naming the file, if it is not a JSON object.
    """
    path = folder / GENERATION_CONFIG
    return read_json(path) if is_file(path) else {}


class HuggingFaceCheckpoint:
    """The tensors of a checkpoint folder, checked against its config when opened.

    Tied embeddings and head may be stored under either name. Where both are stored and differ, as when an
    adapter was merged into one of them, they are not tied: ``config.tie_word_embeddings`` is False then,
    whatever config.json says (as in transformers 5).

    Raises:
        ValueError: naming the first tensor that is missing, unexpected, of the wrong shape or
            not floating point, or the file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields, config = _read_fields_and_config(folder)
        self._format = quantized_format(folder, fields)
        found, absent = _locate_tensors(folder)
        table = tensor_table(fields, config)
        prefixed = table.prefix.startswith(_MODEL_PREFIX)
        self._tensors = _with_prefix(found, [*found, *absent]) if prefixed else found
        self._reader = TensorReader()
        self.config = self._resolve_head(config, table)
        self._table = table if self.config == config else tensor_table(fields, self.config)
        self._linears: dict[str, StoredLinear] = {}
        self._check_names(_with_prefix(absent, [*found, *absent]) if prefixed else absent)
        self._coded = self._find_coded()
        self._warn_of_unused()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({tensor.path for tensor in self._tensors.values()})

    @property
    def quantized(self) -> bool:
        """Whether any weight is stored in a quantized format."""
        return bool(self._linears)

    @property
    def coded(self) -> Mapping[str, CodedKind]:
        """The model's linear layers of which ``block`` hands out codes, and what these are."""
        return self._coded

    def block(self, index: int) -> dict[str, np.ndarray | CodedWeight]:
        """All tensors of block ``index``, in the form that ``models.block`` describes."""
        prefix = self._table.prefix.format(index=index)
        return {
            ours: source.read(*(self.tensor(prefix + name) for name in source.names))
            for ours, source in self._table.block.items()
        }

    def global_names(self) -> list[str]:
        """Names, as used here, of the tensors outside the blocks."""
        return list(self._table.outside)

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``: embeddings, final norm or (untied) head."""
        source = self._table.outside[name]
        return np.asarray(as_float(source.read(self.tensor(source.name))))

    def tensor(self, name: str) -> np.ndarray | CodedWeight:
        """One of the checkpoint's tensors, by its name there and in the dtype of the file; or what stands for it."""
        if name in self._linears:
            return self._linears[name].read(self._reader.read)
        return self._reader.read(self._tensors[name])

    def check_finite(self, *, progress: bool = True) -> None:
        """Read every tensor once; ValueError names the first with a NaN or an infinity, also of bfloat16."""
        names = list(self._table.shapes(self.config.num_layers))
        for name in tqdm(names, desc="checking tensors", unit="tensor", disable=not progress, leave=False):
            tensor = self.tensor(name)
            path = self._linears[name].path if name in self._linears else self._tensors[name].path
            for values in jax.tree.leaves(tensor):
                check_values(name, path, values)

    def _resolve_head(self, config: ModelConfig, table: TensorTable) -> ModelConfig:
        """The config, tied only if the stored tensors are; a tied matrix goes by the embedding's name."""
        embedding = table.outside["embed_tokens"].name
        if not config.tie_word_embeddings or HEAD not in self._tensors:
            return config
        if embedding not in self._tensors or _equal(self._tensors[embedding], self._tensors[HEAD]):
            self._tensors.setdefault(embedding, self._tensors.pop(HEAD))
            return config
        logger.warning(
            "%s: config.json ties head and embeddings, but the weights hold two that differ: not tied", self.folder
        )
        return dataclasses.replace(config, tie_word_embeddings=False)

    def _check_names(self, absent: Mapping[str, str]) -> None:
        expected = self._table.shapes(self.config.num_layers)
        if self._format is not None:
            if gone := sorted(name for name in absent if f"{name.rpartition('.')[0]}.weight" in expected):
                raise ValueError(absent[gone[0]])
            for name, shape in expected.items():
                plain = name in self._tensors and self._tensors[name].dtype in _FLOATS
                if not plain and (linear := StoredLinear.find(name, shape, self._format, self._tensors)):
                    self._linears[name] = linear
        wanted = set(expected) - set(self._linears)
        found = {name for name in self._tensors if _ROTARY_MODULE not in name.split(".")}
        if missing := sorted(wanted - found):
            if missing[0] in absent:
                raise ValueError(absent[missing[0]])
            raise ValueError(
                f"{self.folder} lacks tensor {missing[0]}{and_more(missing)}, which its config.json asks for"
                + (" (tie_word_embeddings is false)" if missing[0] == HEAD else "")
            )
        parts = {
            name.removesuffix(".weight") + suffix for name, linear in self._linears.items() for suffix in linear.parts
        }
        if extra := sorted(name for name in found - wanted - parts if not self._is_unused(name)):
            raise ValueError(
                f"{self.folder} has unexpected tensor {extra[0]}{and_more(extra)}; "
                f"no layer of a {self.config.model_type} takes it"
            )
        if unneeded := sorted(set(absent) - set(expected)):
            logger.warning(
                "%s: the index lists %s%s, which no file holds and no layer takes",
                self.folder, unneeded[0], and_more(unneeded),
            )  # fmt: skip
        for name, shape in expected.items():
            if name in self._linears:
                continue
            tensor = self._tensors[name]
            if tensor.shape != shape:
                raise ValueError(f"tensor {name} in {tensor.path} has shape {tensor.shape}; expected {shape}")
            if tensor.dtype not in _FLOATS:
                raise ValueError(
                    f"tensor {name} in {tensor.path} has dtype {tensor.dtype}; expected a float of 16 bits or more"
                )

    def _is_unused(self, name: str) -> bool:
        """Whether a quantized checkpoint may have a tensor that changes nothing here."""
        if self._format is None:
            return False
        tensor = self._tensors[name]
        # AutoGPTQ gives every layer a bias.
        zeros = name.endswith(".bias") and tensor.dtype in _FLOATS and not self._reader.read(tensor).any()
        return zeros or name.endswith((*UNUSED, *CACHE_SCALES))

    def _warn_of_unused(self) -> None:
        if any(name.endswith(CACHE_SCALES) for name in self._tensors):
            logger.info("%s: its scales for quantized keys and values are not used; the cache has its own", self.folder)

    def _find_coded(self) -> dict[str, CodedKind]:
        """The fused linear layers whose parts are all coded alike, in a way that can be read as codes."""
        coded: dict[str, CodedKind] = {}
        for index in range(self.config.num_layers if self._linears else 0):
            prefix = self._table.prefix.format(index=index)
            for linear in linears_of(self.config):
                sources = [self._table.block[f"{part}.weight"] for part in linear.parts]
                stored = [self._linears.get(prefix + name) for source in sources for name in source.names]
                kinds = {None if each is None else each.storage.kind for each in stored}
                kind = kinds.pop() if len(kinds) == 1 else None
                if kind is not None and all(source.keeps(kind.group_size) for source in sources):
                    coded[f"layers.{index}.{linear.name}"] = kind
        return coded


def check_values(name: str, path: Path, values: np.ndarray) -> None:
    """ValueError names a float tensor with a NaN or an infinity, also of bfloat16."""
    if not jnp.issubdtype(values.dtype, np.floating):
        return
    finite = np.isfinite(values)
    if values.dtype.itemsize > 2:
        finite &= np.abs(values) <= _LARGEST
    if not finite.all():
        where = np.unravel_index(int(np.argmin(finite)), values.shape)
        raise ValueError(
            f"tensor {name} in {path} holds {values[where]} at {tuple(map(int, where))}; expected finite numbers"
        )


def _equal(one: StoredTensor, two: StoredTensor) -> bool:
    """Whether two matrices are of one dtype and the same bytes."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    if len(one.shape) != 2 or one.dtype not in _FLOATS:
        return True  # and neither can be used
    readers = TensorReader(), TensorReader()  # each keeps its own file open
    step = max(1, _COMPARED_BYTES // (8 * max(1, one.shape[1])))
    slices = (slice(start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step))
    return all(readers[0].read(one, rows).tobytes() == readers[1].read(two, rows).tobytes() for rows in slices)


def and_more(names: list[str]) -> str:
    """What follows the first of ``names`` in a message."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _with_prefix(tensors: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """By the names of a model with a head: what is saved from one without leaves out their first part."""
    if any(name.startswith(_MODEL_PREFIX) for name in names):
        return dict(tensors)
    return {name if name == HEAD else _MODEL_PREFIX + name: value for name, value in tensors.items()}


def _locate_tensors(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, and the names that an index lists in vain, with what is wrong.

    From a single file or an index; safetensors come first, all as in transformers.
    """
    named = [(path.stem, path.suffix) for path in sorted(folder.glob("gptq_model-*.safetensors"))]  # AutoGPTQ's
    for stem, suffix in (("model", ".safetensors"), *named, ("pytorch_model", ".bin")):
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if is_file(single):
            return tensors_in(single), {}
        if is_file(index):
            return _indexed_tensors(index)
    raise ValueError(
        f"{folder} has no weights; expected model.safetensors, pytorch_model.bin, or one of them with an index"
    )


def _indexed_tensors(index: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; expected tensor names and their files")
    names_in: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise ValueError(f"{index} maps {name} to {quote(file)}; expected the name of a file in {index.parent}")
        names_in.setdefault(file, []).append(name)
    found: dict[str, StoredTensor] = {}
    absent: dict[str, str] = {}
    for file, names in sorted(names_in.items()):
        path = index.parent / file
        stored = tensors_in(path) if is_file(path) else None
        for name in names:
            if stored is None:
                absent[name] = f"{index} names {file}, which is not in {index.parent}, for tensor {name}"
            elif name not in stored:
                absent[name] = f"{index} says that tensor {name} is in {file}, but it is not"
            else:
                found[name] = stored[name]
    return found, absent


def _stays_inside(file: str) -> bool:
    """Whether a name is, by its text, one in the folder; the file may be a link to elsewhere, as in the hub's cache."""
    path = PureWindowsPath(file)  # whose parts / ends as well, and which has drives
    return "\\" not in file and bool(path.parts) and not path.anchor and ".." not in path.parts
