"""A converted model as a Hugging Face folder, for other engines: its codes (compressed-tensors), or floats.

What conversion folded into weights goes along. What is left to run time does not: S, the offset of keys and the formats
of cache and queries. S and the offset change no score (``Attention``), so that a float cache loses nothing by that.
"""

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from checkpoints_convert.compressed_form import Form, compression_config, forms_of
from checkpoints_convert.exported_block import ONLINE, exported_block, is_shared
from checkpoints_convert.huggingface_config import exported_config
from fireq_jax import json_files
from fireq_jax.checkpoints.folder import UNVERIFIED, StoredModel
from fireq_jax.checkpoints.safetensors_writer import TensorSpec, shards_of, write_shards
from fireq_jax.checkpoints.tokenizer import companion_files
from fireq_jax.command_line import check_interrupted
from fireq_jax.config_fields import check_kinds
from fireq_jax.models.architectures import tensor_table
from fireq_jax.models.block import FLOAT32, linears_of
from fireq_jax.models.coded_weight import CodedWeight, HostTensor
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.family import HEAD
from fireq_jax.models.llama import CausalLM
from fireq_jax.models.parameters import Parameter, parameters_of
from fireq_jax.models.tensor_source import TensorTable, written
from fireq_jax.whole_files import check_digest
from pallas_kernels.quantized_tensor import QuantizedTensor

ExportFormat = Literal["compressed-tensors", "huggingface"]
Dtype = Literal["bfloat16", "float32"]
logger = logging.getLogger(__name__)
_dequantize = jax.jit(QuantizedTensor.dequantize)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        model: a folder that ``fireq-convert`` or ``CausalLM.save`` wrote.
        output: folder to make; it may be there if it is empty.
        format: "compressed-tensors", or "huggingface" for weights that are floats again.
        dtype: of floats; norms, routers and sinks stay float32.
        verify: that the model's files are those that were written.
    """

    model: Path
    output: Path
    format: ExportFormat
    dtype: Dtype = "bfloat16"
    verify: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)


def export(options: ExportOptions, *, progress: bool = True) -> int:
    """Write the folder, whole or not at all; returns the bytes of its weights.

    Raises:
        ValueError: for a model that cannot be written so, or an output that holds something; there is no output then.
        OSError, KeyboardInterrupt: likewise.
    """
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ValueError(f"{options.output} is there already; expected a new or an empty folder")
    stored = StoredModel.open(options.model, verify=options.verify)
    if stored.source is not None:
        raise ValueError(f"{options.model} is a Hugging Face checkpoint; expected a model that fireq-convert wrote")
    exporter = _Exporter(stored, options)
    shards = shards_of(exporter.planned)
    size = sum(spec.nbytes for spec in exporter.planned.values())
    logger.info("%s", exporter.description)
    logger.info("%s: %.1f MB of weights in %d file(s)", options.output, size / 1e6, len(shards))
    aside = options.output.with_name(f"{options.output.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        write_shards(aside, shards, exporter.tensors(progress=progress))
        for path in exporter.companions:
            shutil.copyfile(path, aside / path.name)
        json_files.write_json(aside / "config.json", exporter.fields)
        aside.replace(options.output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    exporter.log_difference()
    return size


class _Exporter:
    """One export: what it is going to write is known once this is made, and nothing has been written.

    Attributes:
        fields: config.json.
        planned: every tensor, in the order in which :meth:`tensors` makes them.
        companions: files that go along as they are.
    """

    def __init__(self, stored: StoredModel, options: ExportOptions) -> None:
        self.stored, self.dtype = stored, np.dtype(options.dtype)
        model = CausalLM.abstract(stored, dtype=options.dtype)
        self._parameters = parameters_of(model)
        rebased = "head_basis" in self._parameters
        tied = stored.config.tie_word_embeddings and not rebased
        self.config: ModelConfig = dataclasses.replace(stored.config, tie_word_embeddings=tied)
        self.fields = exported_config(stored.folder, self.config, options.dtype)
        self._table: TensorTable = tensor_table(self.fields, self.config)
        self._check_values()
        self._forms: dict[str, Form] = {}
        if options.format == "compressed-tensors":
            self._forms = forms_of(stored.quantization, self._find_coded())
        self.planned = self._plan()
        if self._forms:
            fp8_rows = stored.quantization.activation_format == "fp8"
            self.fields["quantization_config"] = compression_config(
                self._forms_there(), self._floats(), fp8_rows=fp8_rows
            )
        self.companions = self._find_companions()
        self._energy, self._difference = 0.0, 0.0

    @property
    def description(self) -> str:
        """What the folder is going to hold, and what of the model it is not."""
        quantization, forms = self.stored.quantization, list(dict.fromkeys(self._forms.values()))
        rows = ", activations in FP8 by token" if quantization.activation_format == "fp8" else ""
        lines = [f"{form.description}{rows} ({form.name})" for form in forms] or [f"weights in {self.dtype}"]
        if forms and (left := [name for name in self._floats() if name != HEAD.removesuffix(".weight")]):
            lines.append(f"{len(left)} linear layers stay floats, {left[0]} first")
        if any(name in parameter for parameter in self._parameters for name in ONLINE):
            lines.append("not exported: S and the offset of keys, by which INT4 caches gain, and float caches nothing")
        if is_shared(self.config):
            lines.append("the norms of queries and keys, which all heads share there, lose N of each head")
        if kv_formats := {quantization.kv_format, *dict(quantization.layer_kv_formats).values()} - {"none"}:
            lines.append(f"not exported: the cache in {', '.join(sorted(kv_formats))}; the other engine's own is used")
        if "head_basis" in self._parameters:
            lines.append("the head, tied to rotated embeddings here, becomes a matrix of its own")
        if quantization.lm_head_format != "none":
            tied = self.config.tie_word_embeddings
            lines.append("the FP8 head is not exported: it is tied" if tied else "the FP8 head becomes floats")
        return "\n".join(lines)

    def tensors(self, *, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Name and array of everything planned; a layer at a time is in memory."""
        for name in self._outside:
            yield from self._globals(name)
        layers = range(self.config.num_layers)
        for index in tqdm(layers, desc="exporting", unit="block", disable=not progress, leave=False):
            check_interrupted()
            yield from self._block(index)

    def log_difference(self) -> None:
        """Say how far the exported weights are from those that the kernels multiply by."""
        if self._energy and self._difference:
            logger.info(
                "our kernels round each code times its E4M3 scale to E4M3, and other engines do not: their weights "
                "differ from ours by %.2f%% (root mean square)",
                100 * (self._difference / self._energy) ** 0.5,
            )

    # --- what there is to write ---------------------------------------------------------------------------

    def _check_values(self) -> None:
        smoothing = self.stored.quantization.smoothing
        if self.config.head_width is not None and smoothing is not None and smoothing.value_basis != "channels":
            raise ValueError(
                f"{self.stored.folder}: heads of {self.config.head_width} channels are padded to "
                f"{self.config.head_dim}, and value_basis {smoothing.value_basis!r} spreads values over all; convert "
                "a model for export with value_basis 'channels' (recipe fireq)"
            )

    def _find_coded(self) -> dict[str, int]:
        """K of the quantized linear layers, by their names here, whose codes the family's checkpoints can hold."""
        found, parameters = {}, self._parameters
        for index, linear in itertools.product(range(self.config.num_layers), linears_of(self.config)):
            name = f"layers.{index}.{linear.name}"
            weight = parameters[f"{name}.weight"]
            sources = [self._table.block[f"{part}.weight"] for part in linear.parts]
            if isinstance(weight, QuantizedTensor):
                size = None if weight.group_scale is None else weight.group_size
                if all(source.keeps(size) and not source.transposed for source in sources):
                    found[name] = weight.shape[-1]
        if not found:
            raise ValueError(
                f"{self.stored.folder} has no quantized layers that a {self.config.model_type} checkpoint can hold as "
                "codes: use --format huggingface"
            )
        return found

    @property
    def _outside(self) -> list[str]:
        """Names here of what is in no block, the embedding first."""
        return ["embed_tokens", *(name for name in self._table.outside if name != "embed_tokens")]

    def _plan(self) -> dict[str, TensorSpec]:
        outside = self._table.outside
        planned = {outside[name].name: TensorSpec(outside[name].shape, self._dtype_of(name)) for name in self._outside}
        for index in range(self.config.num_layers):
            prefix = self._table.prefix.format(index=index)
            forms = self._forms_of_parts(index)
            for ours, source in self._table.block.items():
                for name in source.names:
                    if (form := forms.get(ours)) is not None:
                        stem = prefix + name.removesuffix(".weight")
                        planned |= {stem + suffix: spec for suffix, spec in form.specs(source.shape).items()}
                    else:
                        planned[prefix + name] = TensorSpec(source.shape, self._dtype_of(ours))
        return planned

    def _dtype_of(self, ours: str) -> np.dtype:
        return np.dtype(np.float32) if any(part in ours for part in FLOAT32) else self.dtype

    def _forms_of_parts(self, index: int) -> dict[str, Form]:
        """The forms of those tensors of a block that are written as codes, by the tensors' names here."""
        return {
            f"{part}.weight": self._forms[name]
            for linear in linears_of(self.config)
            if (name := f"layers.{index}.{linear.name}") in self._forms
            for part in linear.parts
        }

    def _forms_there(self) -> dict[str, Form]:
        """The forms by the checkpoint's names of the layers."""
        return {
            self._table.prefix.format(index=index) + name.removesuffix(".weight"): form
            for index in range(self.config.num_layers)
            for ours, form in self._forms_of_parts(index).items()
            for name in self._table.block[ours].names
        }

    def _floats(self) -> list[str]:
        """Names of the linear layers that are written as floats."""
        suffix = ".weight"
        matrices = [name for name, spec in self.planned.items() if name.endswith(suffix) and len(spec.shape) == 2]
        embedding = self._table.outside["embed_tokens"].name
        floats = [name for name in matrices if self.planned[name].dtype.itemsize > 1 and name != embedding]
        return [name.removesuffix(suffix) for name in dict.fromkeys([HEAD, *floats])]

    def _find_companions(self) -> list[Path]:
        folder, digests = self.stored.folder, self.stored.digests or {}
        with companion_files(folder) as companions:  # a converted folder's are its own
            for name in companions.keys() & digests.keys():
                check_digest(companions[name], digests[name], UNVERIFIED)
            return [path for name, path in companions.items() if name != "config.json"]

    # --- its tensors --------------------------------------------------------------------------------------

    def _read(self, part: str) -> dict[str, Parameter]:
        return self.stored.read_part(part, self._parameters)

    def _globals(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        if name == "lm_head" and "head_basis" in self._parameters:
            rows, basis = self._read("embed_tokens")["embed_tokens"], self._read("head_basis")["head_basis"]
            wide = [array.astype(jnp.float32) for array in (rows, basis) if not isinstance(array, QuantizedTensor)]
            array: Parameter = jnp.matmul(*wide, precision="highest")
        else:
            array = self._read(name.split(".")[0])[name]
        values = np.asarray(_dequantize(array) if isinstance(array, QuantizedTensor) else array)
        for theirs, tensor in written({name: self._table.outside[name]}, {name: values}).items():
            yield theirs, np.asarray(tensor).astype(self._dtype_of(name))

    def _block(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        prefix = f"layers.{index}."
        fused: dict[str, HostTensor] = {}
        for name, parameter in self._read(f"layers.{index}").items():
            if not isinstance(parameter, QuantizedTensor):
                fused[name.removeprefix(prefix)] = np.asarray(parameter)
            elif name.removesuffix(".weight") in self._forms:
                fused[name.removeprefix(prefix)] = self._codes(parameter)
            else:
                fused[name.removeprefix(prefix)] = np.asarray(_dequantize(parameter))
        try:
            theirs = exported_block(fused, self.config, self._table)
        except ValueError as error:
            raise ValueError(f"{self.stored.folder}, layer {index} of a {self.config.model_type}: {error}") from error
        prefix, forms = self._table.prefix.format(index=index), self._forms_of_parts(index)
        for ours, source in self._table.block.items():
            for name in source.names:
                if (tensor := theirs.pop(name, None)) is None:
                    continue  # of several parts the first
                if isinstance(tensor, CodedWeight):
                    for suffix, array in forms[ours].encode(tensor).items():
                        yield prefix + name.removesuffix(".weight") + suffix, array
                else:
                    yield prefix + name, np.asarray(tensor).astype(self._dtype_of(ours))

    def _codes(self, weight: QuantizedTensor) -> CodedWeight:
        coded = CodedWeight.unpack(weight)
        if weight.group_scale is not None:
            kernels = np.asarray(_dequantize(weight))
            self._energy += float(np.vdot(kernels, kernels))
            difference = kernels - coded.dequantize()
            self._difference += float(np.vdot(difference, difference))
        return coded
