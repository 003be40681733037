"""Small random checkpoints for the converter's tests, and what came of them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fireq_jax import LlamaForCausalLM
from fireq_jax.huggingface import expected_shapes, read_config
from fireq_jax.models.parameters import parameters_of


def write_checkpoint(folder: Path, fields: dict[str, Any], std: float, **changes: np.ndarray) -> Path:
    """A checkpoint in Hugging Face form with weights of N(0, std^2); ``changes`` replace tensors by name."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, std, shape).astype(np.float32)
        for name, shape in expected_shapes(read_config(folder)).items()
    }
    save_file(tensors | changes, folder / "model.safetensors")
    return folder


def parameter_bytes(folder: Path) -> dict[str, bytes]:
    """A converted model's parameters, to be compared bit for bit."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(parameters_of(model))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
