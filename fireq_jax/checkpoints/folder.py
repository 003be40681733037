"""Save and load models: our own folders (Orbax) and Hugging Face's.

A converted folder holds::

    fireq.json              model and quantization config; written last, so its presence means complete
    params/layers.0 ...     one Orbax checkpoint a layer, committed as a whole
    params/embed_tokens, params/norm, params/lm_head
    config.json, tokenizer files, generation_config.json   as they came
    report.json             what conversion measured
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from fireq_jax.json_files import errors_name, read_json, write_json
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig

MANIFEST = "fireq.json"
WORK_FOLDER = ".conversion"  # what an interrupted conversion needs to go on
FORMAT_VERSION = 1
_RESTORE_THREADS = 4
_FLOATS = {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model folder of either kind, before its arrays are read.

    Attributes:
        folder: where it is.
        config: the architecture.
        quantization: how it is quantized; ``recipes.none()`` for Hugging Face's.
        source: the Hugging Face checkpoint; None for a converted folder.
    """

    folder: Path
    config: ModelConfig
    quantization: QuantizationConfig
    source: HuggingFaceCheckpoint | None

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """What ``read`` commits arrays to; None where it leaves that open."""
        return _device_sharding() if self.source is None else None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Recognise a folder.

        Raises:
            ValueError: if it is neither kind, incomplete, or its tensors do not fit its config.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; expected a Hugging Face checkpoint or a converted model")
        if (folder / MANIFEST).is_file():
            config, quantization = read_manifest(folder)
            for index in range(config.num_layers):  # before any layer is made: the manifest may ask for thousands
                _check_there(folder, f"layers.{index}")
            return cls(folder, config, quantization, None)
        check_finished(folder)
        source = HuggingFaceCheckpoint(folder)
        return cls(folder, source.config, recipes.none(), source)

    def read(self, expected: Mapping[str, Parameter], dtype: jax.typing.DTypeLike) -> dict[str, Parameter]:
        """All parameters by name.

        Args:
            expected: the abstract parameters of the model that they are for.
            dtype: of embeddings, head and unquantized weights.

        Raises:
            ValueError: if the stored arrays are others than ``expected``'s.
        """
        if self.source is None:
            return _restore_all(self.folder, expected)
        parameters: dict[str, Parameter] = {}
        for index in range(self.config.num_layers):
            block = {name: jnp.asarray(array) for name, array in self.source.block(index).items()}
            parameters |= layer_parameters(block, index, self.quantization, dtype)
        arrays = {name: self.source.global_tensor(name) for name in self.source.global_names()}
        return parameters | global_parameters(arrays, self.quantization, dtype)


def check_finished(folder: Path) -> None:
    """Raise ValueError if a conversion has been begun there, and not ended."""
    begun = any((folder / name).exists() for name in ("params", WORK_FOLDER))
    if begun and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is an unfinished conversion (no {MANIFEST}); run fireq-convert --resume on it")


def read_manifest(folder: Path) -> tuple[ModelConfig, QuantizationConfig]:
    """Model and quantization config of a converted folder.

    Raises:
        ValueError: for another format version, or unknown or invalid entries.
    """
    path = folder / MANIFEST
    fields = read_json(path)
    if fields.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {fields.get('format_version')}; expected {FORMAT_VERSION}")
    if set(fields) != (expected := {"format_version", "model", "quantization"}):
        raise ValueError(f"{path} has keys {sorted(fields)}; expected {sorted(expected)}")
    with errors_name(path):
        return ModelConfig.from_dict(fields["model"]), QuantizationConfig.from_dict(fields["quantization"])


def write_manifest(folder: Path, config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Mark a folder complete."""
    fields = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "quantization": quantization.to_dict()}
    write_json(folder / MANIFEST, fields)


def check_writable(folder: Path) -> None:
    """Raise ValueError where Orbax would write nothing, and say only in its log that it has not."""
    if "[" in str(folder.absolute()):
        raise ValueError(f"{folder.absolute()} has a '[' in it, which Orbax takes for a pattern; give another folder")


def save_part(folder: Path, part: str, parameters: Mapping[str, Parameter]) -> None:
    """Commit one part ("layers.N", "embed_tokens" ...) of a model's parameters."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(part_path(folder, part), _flatten(parameters), force=True)


def part_path(folder: Path, part: str) -> Path:
    """Where a part is; it exists only once it is committed as a whole."""
    return folder.absolute() / "params" / part


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]


def save_model(
    folder: Path, config: ModelConfig, quantization: QuantizationConfig, parameters: Mapping[str, Parameter]
) -> None:
    """Write a model to ``folder`` (without a tokenizer), part by part, manifest last.

    Raises:
        ValueError: for a folder that cannot be written to (:func:`check_writable`).
    """
    check_writable(folder)
    # A model that was here must not look complete while it is half replaced.
    (folder / MANIFEST).unlink(missing_ok=True)
    for part in dict.fromkeys(map(part_of, parameters)):
        save_part(folder, part, {name: value for name, value in parameters.items() if part_of(name) == part})
    write_manifest(folder, config, quantization)


def _restore_all(folder: Path, expected: Mapping[str, Parameter]) -> dict[str, Parameter]:
    def restore(part: str) -> dict[str, Parameter]:
        return restore_part(folder, part, {name: value for name, value in expected.items() if part_of(name) == part})

    parts = list(dict.fromkeys(map(part_of, expected)))
    with ThreadPoolExecutor(_RESTORE_THREADS) as pool:
        return {name: value for loaded in pool.map(restore, parts) for name, value in loaded.items()}


def restore_part(folder: Path, part: str, expected: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Read a part into the shapes of ``expected``; float arrays take its dtypes.

    Raises:
        ValueError: if the part is missing or its arrays are others than ``expected``'s.
    """
    path = _check_there(folder, part)
    wanted = _flatten(expected)
    device = _device_sharding()
    # As they are stored: asked for a dtype, Orbax casts silently.
    options = {
        name: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=device, global_shape=leaf.shape, strict=True)
        for name, leaf in wanted.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            restore = ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=options)
            loaded = checkpointer.restore(path, args=restore)
        except Exception as error:  # Orbax raises bare Exception for an unreadable array
            raise ValueError(f"{path} does not hold the arrays that {MANIFEST} describes: {error}") from error
    for name, leaf in wanted.items():
        stored = loaded[name].dtype
        if stored == leaf.dtype:
            continue
        # Only a change of precision of what is not quantized is meant.
        if not {stored, leaf.dtype} <= _FLOATS:
            raise ValueError(f"{path} holds {name} as {stored}; {MANIFEST} says {leaf.dtype}")
        loaded[name] = loaded[name].astype(leaf.dtype)
    return {
        name: dataclasses.replace(value, **{field: loaded[f"{name}.{field}"] for field in _arrays(value)})
        if not isinstance(value, jax.ShapeDtypeStruct | jax.Array)
        else loaded[name]
        for name, value in expected.items()
    }


def _check_there(folder: Path, part: str) -> Path:
    path = part_path(folder, part)
    if not path.is_dir():
        raise ValueError(f"{path} is missing; the model in {folder} is incomplete")
    return path


def _device_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _flatten(parameters: Mapping[str, Parameter]) -> dict[str, Array]:
    """Plain arrays by name; a quantized tensor gives one entry a field."""
    flat: dict[str, Array] = {}
    for name, value in parameters.items():
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            flat[name] = value
        else:
            flat |= {f"{name}.{field}": array for field, array in _arrays(value).items()}
    return flat


def _arrays(tensor: Any) -> dict[str, Array]:
    fields = {field.name: getattr(tensor, field.name) for field in dataclasses.fields(tensor) if not field.metadata}
    return {name: array for name, array in fields.items() if array is not None}
