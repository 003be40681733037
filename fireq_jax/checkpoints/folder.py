"""Save and load models: our own folders (Orbax) and Hugging Face's.

A converted folder holds::

    fireq.json              model and quantization config; written last, so its presence means complete
    params/layers.0 ...     one Orbax checkpoint a layer, committed as a whole
    params/embed_tokens, params/norm, params/lm_head, params/head_basis
    config.json, tokenizer files, generation_config.json   as they came
    report.json             what conversion measured
    README.md               a card for people and the hub, which nothing reads

``fireq.json`` ends with SHA-256 digests (``whole_files.digest``) of each part and of what a tokenizer is made of,
and a checksum of its own. They are compared when these are read, each part's on the thread that reads it.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array

from fireq_jax.checkpoints.gguf_file import find_gguf
from fireq_jax.checkpoints.kept_codes import kept_tensors, quantization_as_stored
from fireq_jax.checkpoints.reader import CheckpointReader, open_checkpoint
from fireq_jax.config_fields import mapping, quote
from fireq_jax.json_files import errors_name, read_json, read_sealed, write_sealed
from fireq_jax.models.block import linear_names
from fireq_jax.models.coded_weight import BlockTensor
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters
from fireq_jax.quantization.config import QuantizationConfig
from fireq_jax.whole_files import check_digest, digest

MANIFEST = "fireq.json"
WORK_FOLDER = ".conversion"  # what an interrupted conversion needs to go on
FORMAT_VERSION = 2
UNVERIFIED = "convert it again, or take it as it is with --no-verify (verify=False)"
_WITHOUT_DIGESTS = 1  # an earlier format, which is read too
_RESTORE_THREADS = 4
_FLOATS = {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
_PART = re.compile(r"(layers\.\d+|embed_tokens|norm|lm_head|head_basis)(\.orbax-checkpoint-tmp.*)?")
# What makes Orbax write elsewhere, or part of it nowhere: patterns, separators and, as in "gs:/", schemes.
_MISTAKEN = re.compile(r"\[|\\|gs:(?=/|$)")
logger = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """What ``fireq.json`` says.

    Attributes:
        config: the architecture.
        quantization: how the model is quantized.
        digests: what has to be the same when it is read: SHA-256 by path in the folder; None in format 1.
    """

    config: ModelConfig
    quantization: QuantizationConfig
    digests: Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model of any kind, before its arrays are read.

    Attributes:
        folder: where it is.
        config: the architecture.
        quantization: how it is quantized; of a checkpoint of others how it runs as it is.
        source: the Hugging Face checkpoint or GGUF file; None for a converted folder.
        digests: those of the manifest that reading verifies; None for nothing.
    """

    folder: Path
    config: ModelConfig
    quantization: QuantizationConfig
    source: CheckpointReader | None
    digests: Mapping[str, str] | None = None

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """What ``read`` commits arrays to, from JAX's settings here; None where it leaves that open."""
        return _default_sharding() if self.source is None else None

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """Recognise a folder.

        Args:
            folder: a Hugging Face checkpoint or a converted model; or a GGUF file.
            verify: of a converted one, that what is read is what was written (``whole_files.digest`` says how fast).

        Raises:
            ValueError: if it is none of these, incomplete, or its tensors do not fit its config.
        """
        if not folder.is_dir() and find_gguf(folder) is None:
            raise ValueError(
                f"{folder} is not a folder; expected a Hugging Face checkpoint, a converted model or a GGUF file (the "
                "commands download a hub id; in Python take what huggingface_hub.snapshot_download returns)"
            )
        if (folder / MANIFEST).is_file():
            config, quantization, digests = read_manifest(folder, verify=verify)
            if digests is None:
                logger.warning("%s: format %d has no digests; nothing is verified", folder, _WITHOUT_DIGESTS)
            for index in range(config.num_layers):  # before any layer is made: the manifest may ask for thousands
                _check_there(folder, f"layers.{index}")
            return cls(folder, config, quantization, None, digests if verify else None)
        check_finished(folder)
        source = open_checkpoint(folder)
        quantization = quantization_as_stored(source.config, source.coded)
        if source.quantized:
            names = linear_names(source.config)
            kept = [name for name in names if not quantization.keeps_float(name)]
            logger.log(
                logging.INFO if len(kept) == len(names) else logging.WARNING,
                "%s is a quantized checkpoint: %d of %d linear layers keep their codes%s",
                folder, len(kept), len(names), "" if len(kept) == len(names) else "; fireq-convert quantizes others",
            )  # fmt: skip
        return cls(folder, source.config, quantization, source)

    def read_part(
        self, part: str, expected: Mapping[str, Parameter], default: jax.sharding.Sharding | None = None
    ) -> dict[str, Parameter]:
        """The parameters of one part ("layers.N", "embed_tokens" ...) of a converted folder, verified.

        Arguments and errors are those of :func:`restore_part`; ``expected`` is of all parts.
        """
        if self.digests is not None:
            if (name := f"params/{part}") not in self.digests:
                raise ValueError(f"{self.folder / MANIFEST} has no digest of {name}; {UNVERIFIED}")
            check_digest(part_path(self.folder, part), self.digests[name], UNVERIFIED)
        wanted = {name: value for name, value in expected.items() if part_of(name) == part}
        return restore_part(self.folder, part, wanted, default)

    def read(self, expected: Mapping[str, Parameter], dtype: jax.typing.DTypeLike) -> dict[str, Parameter]:
        """All parameters by name.

        Args:
            expected: the abstract parameters of the model that they are for; arrays go where their shardings
                say, else where JAX puts new arrays.
            dtype: of embeddings, head and unquantized weights.

        Raises:
            ValueError: if the stored arrays are others than ``expected``'s, or than those that were stored.
        """
        if self.source is None:
            return self._read_all(expected)
        source, parameters, clipped = self.source, dict[str, Parameter](), 0
        kept = [name for name in linear_names(self.config) if not self.quantization.keeps_float(name)]

        def read_block(index: int) -> tuple[Mapping[str, BlockTensor], int]:
            block = source.block(index)
            return block, sum(codes.clipped for codes in kept_tensors(block, index, self.config, kept).values())

        with ThreadPoolExecutor(1) as pool:  # reads a block while the one before goes to the device
            blocks = [pool.submit(read_block, 0)]
            for index in range(self.config.num_layers):
                block, count = blocks.pop().result()
                if index + 1 < self.config.num_layers:
                    blocks.append(pool.submit(read_block, index + 1))
                clipped += count
                parameters |= _placed(layer_parameters(block, index, self.quantization, dtype), expected)
        if clipped:
            logger.info("%s: %d codes of -8 are -7 here, with the same scales", self.folder, clipped)
        arrays = {name: self.source.global_tensor(name) for name in self.source.global_names()}
        return parameters | _placed(global_parameters(arrays, self.quantization, dtype), expected)

    def _read_all(self, expected: Mapping[str, Parameter]) -> dict[str, Parameter]:
        parts = list(dict.fromkeys(map(part_of, expected)))
        stored = [path for path in (self.folder / "params").glob("*") if path.is_dir()]
        if unknown := sorted(path for path in stored if path.name not in parts):
            described = self.folder / MANIFEST
            raise ValueError(f"{unknown[0]} is no part of the model that {described} describes; expected {parts}")
        default = _default_sharding()  # not on a thread, where it may be another
        with ThreadPoolExecutor(_RESTORE_THREADS) as pool:
            read = pool.map(lambda part: self.read_part(part, expected, default), parts)
            return {name: value for loaded in read for name, value in loaded.items()}


def _placed(parameters: dict[str, Parameter], expected: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The same, where the shardings of ``expected`` say; whether they fit it is not looked at."""
    places = {name: [leaf.sharding for leaf in jax.tree.leaves(expected.get(name))] for name in parameters}
    return {
        name: jax.device_put(value, places[name][0]) if places[name] and places[name][0] is not None else value
        for name, value in parameters.items()
    }


def check_finished(folder: Path) -> None:
    """Raise ValueError if a conversion has been begun there, and not ended."""
    begun = any((folder / name).exists() for name in ("params", WORK_FOLDER))
    if begun and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is an unfinished conversion (no {MANIFEST}); run fireq-convert --resume on it")


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Model and quantization config of a converted folder, and its digests.

    Raises:
        ValueError: for another format version, unknown or invalid entries, or, to ``verify``, changed ones.
    """
    path = folder / MANIFEST
    version = read_json(path).get("format_version")
    if version not in (_WITHOUT_DIGESTS, FORMAT_VERSION):
        raise ValueError(f"{path} has format {version}; expected {FORMAT_VERSION}")
    digested = version == FORMAT_VERSION
    fields = read_sealed(path, UNVERIFIED, verify=verify) if digested else read_json(path)
    expected = {"format_version", "model", "quantization", *(["sha256"] if digested else [])}
    if set(fields) != expected:
        raise ValueError(f"{path} has keys {sorted(fields)}; expected {sorted(expected)}")
    with errors_name(path):
        config = ModelConfig.from_dict(fields["model"])
        quantization = QuantizationConfig.from_dict(fields["quantization"])
        digests = dict(mapping(fields["sha256"], "sha256")) if digested else None
        for name, sha256 in (digests or {}).items():
            if not isinstance(sha256, str):
                raise ValueError(f"sha256 of {name} is {quote(sha256)}; expected 64 hexadecimal digits")
        return Manifest(config, quantization, digests)


def write_manifest(
    folder: Path, config: ModelConfig, quantization: QuantizationConfig, digests: Mapping[str, str]
) -> None:
    """Mark a folder complete."""
    fields = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "quantization": quantization.to_dict()}
    write_sealed(folder / MANIFEST, fields | {"sha256": dict(digests)})


def check_writable(folder: Path) -> None:
    """Raise ValueError where Orbax would write elsewhere or nothing, and say so only in its log."""
    path = str(folder.absolute())
    if found := _MISTAKEN.search(path):
        raise ValueError(f"{path} has a {found[0]!r} in it, which Orbax does not take as it is; give another folder")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!r} is not UTF-8, which Orbax expects; give another folder") from error


def save_part(folder: Path, part: str, parameters: Mapping[str, Parameter]) -> str:
    """Commit one part ("layers.N", "embed_tokens" ...) of a model's parameters; returns its digest.

    Raises:
        OSError: naming the part, if it cannot be written.
    """
    path = part_path(folder, part)
    try:
        with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, _flatten(parameters), force=True)
    except jax.errors.JaxRuntimeError:
        raise  # of the computation that the arrays come from
    except Exception as error:  # tensorstore's are ValueErrors
        raise OSError(f"{path} cannot be written: {error}") from error
    if not (path / "manifest.ocdbt").is_file():
        raise OSError(f"{path} does not hold what Orbax wrote; give a folder with a plainer name")
    return digest(path)


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
        OSError: naming what cannot be written.
    """
    check_writable(folder)
    # A model that was here must not look complete while it is half replaced.
    (folder / MANIFEST).unlink(missing_ok=True)
    parts = list(dict.fromkeys(map(part_of, parameters)))
    digests = {
        f"params/{part}": save_part(folder, part, {n: value for n, value in parameters.items() if part_of(n) == part})
        for part in parts
    }
    remove_other_parts(folder, parts)
    write_manifest(folder, config, quantization, digests)


def remove_other_parts(folder: Path, parts: Sequence[str]) -> None:
    """Remove parts, whole or half written, that are none of ``parts``; not what is no part by its name."""
    for path in (folder / "params").iterdir():
        if path.name not in parts and _PART.fullmatch(path.name):
            shutil.rmtree(path)


def restore_part(
    folder: Path, part: str, expected: Mapping[str, Parameter], default: jax.sharding.Sharding | None = None
) -> dict[str, Parameter]:
    """Read a part into the shapes of ``expected``; float arrays take its dtypes.

    Arrays go to ``expected``'s shardings; ``default``, or where JAX puts new arrays, is for those without.

    Raises:
        ValueError: if the part is missing or its arrays are others than ``expected``'s.
    """
    path = _check_there(folder, part)
    wanted = _flatten(expected)
    default = _default_sharding() if default is None else default
    # As they are stored: asked for a dtype, Orbax casts silently.
    options = {
        name: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=leaf.sharding or default, global_shape=leaf.shape, strict=True
        )
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


def _default_sharding() -> jax.sharding.Sharding:
    """Of a new array: the default device, or replicated over the mesh that is set."""
    return jnp.asarray(np.zeros(())).sharding


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drop what Orbax says of an error beside raising it: tracebacks of its threads, and of what they abandon."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    log, before = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(drop)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        log.removeFilter(drop)
        sys.unraisablehook = before


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
