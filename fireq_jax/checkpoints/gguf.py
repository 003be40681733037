"""Read a GGUF file as a checkpoint: llama.cpp's format, of floats or quantized.

Quantized tensors are handed out as the float32 that they stand for: their blocks of 32 or 256 inputs fit no kernel
here.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fireq_jax.checkpoints.gguf_config import config_fields, gguf_table
from fireq_jax.checkpoints.gguf_file import GGUFFile, check_decodable, gguf_package
from fireq_jax.checkpoints.huggingface import and_more, check_values
from fireq_jax.json_files import errors_name
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.coded_weight import CodedKind, CodedWeight
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.tensor_source import TensorTable

logger = logging.getLogger(__name__)

# Read with the config, or computed from it.
_NO_WEIGHTS = ("rope_freqs.weight", "attn_rot_embd.weight", "attn_rot_embd")


class GGUFCheckpoint:
    """The tensors of a GGUF file or of its parts, checked against its metadata when opened.

    Raises:
        ValueError: naming the file and the first tensor that is missing, unexpected, of the wrong shape or of a type
            that cannot be decoded; or what is wrong with the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = GGUFFile.open(path)
        self._tensors = file.tensors
        with errors_name(path):
            fields, unknown = config_fields(file)
            self.config: ModelConfig = config_from_huggingface(fields)
            self._table = _table(str(file.metadata["general.architecture"]), fields, self.config)
        if unknown:
            logger.warning("%s: keys without a meaning here are ignored: %s", path, ", ".join(unknown))
        self._check_tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """The file, or all of its parts."""
        return sorted({self.path, *(tensor.path for tensor in self._tensors.values())})

    @property
    def quantized(self) -> bool:
        """Whether any weight is stored in a quantized format."""
        return any(tensor.quantized for tensor in self._tensors.values())

    @property
    def coded(self) -> Mapping[str, CodedKind]:
        """None: no codes are handed out."""
        return {}

    def block(self, index: int) -> dict[str, np.ndarray | CodedWeight]:
        """All tensors of block ``index``, in the form that ``models.block`` describes."""
        prefix = self._table.prefix.format(index=index)
        return {
            ours: source.read(*(self._tensors[prefix + name].read() for name in source.names))
            for ours, source in self._table.block.items()
        }

    def global_names(self) -> list[str]:
        """Names, as used here, of the tensors outside the blocks."""
        return list(self._table.outside)

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``: embeddings, final norm or (untied) head."""
        source = self._table.outside[name]
        return np.asarray(source.read(self._tensors[source.name].read()))

    def check_finite(self, *, progress: bool = True) -> None:
        """Read every tensor once; ValueError names the first with a NaN or an infinity, also of bfloat16."""
        names = list(self._table.shapes(self.config.num_layers))
        for name in tqdm(names, desc="checking tensors", unit="tensor", disable=not progress, leave=False):
            check_values(name, self._tensors[name].path, self._tensors[name].read())

    def _check_tensors(self) -> None:
        expected = self._table.shapes(self.config.num_layers)
        if missing := sorted(set(expected) - set(self._tensors)):
            raise ValueError(f"{self.path} lacks tensor {missing[0]}{and_more(missing)}, which its metadata asks for")
        extra = sorted(name for name in set(self._tensors) - set(expected) if not name.endswith(_NO_WEIGHTS))
        if extra:
            raise ValueError(
                f"{self.path} has unexpected tensor {extra[0]}{and_more(extra)}; "
                f"no layer of a {self.config.model_type} takes it"
            )
        for name, shape in expected.items():
            tensor = self._tensors[name]
            if tensor.shape != shape:
                raise ValueError(f"tensor {name} in {tensor.path} has shape {tensor.shape}; expected {shape}")
        for tensor in {tensor.kind: tensor for tensor in self._tensors.values()}.values():
            check_decodable(tensor)


def read_gguf_config(path: Path) -> ModelConfig:
    """The architecture in a GGUF file's metadata.

    Raises:
        ValueError: naming the file, if it is damaged, or describes no model that is here.
    """
    file = GGUFFile.open(path)
    with errors_name(path):
        return config_from_huggingface(config_fields(file)[0])


def _table(name: str, fields: dict, config: ModelConfig) -> TensorTable:
    """Where the tensors are, by the ``gguf`` package's table of names."""
    gguf = gguf_package()
    architecture = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, 1)
    theirs = [stem.rpartition(".")[0] for stem in tensor_table(fields, config).shapes(1)]
    found = {stem: names.get_name(stem) for stem in theirs}
    if unknown := [stem for stem, known in found.items() if known is None]:
        raise ValueError(f"the gguf package has no name for tensor {unknown[0]} of a {name}")
    return gguf_table(name, fields, config, found)
