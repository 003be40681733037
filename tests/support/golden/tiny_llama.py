"""Tiny random Llamas that the tests and ``make_golden.py`` share: configs, weights, folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fireq_jax.models.architectures import checkpoint_shapes

SMALL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# With these sizes both ends of YaRN's band fall between two of the six frequencies.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_YARN_OPTIONS = {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3}
# Name -> changes of SMALL, in transformers' v4 form.
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa_head_dim_80": {"num_key_value_heads": 1, "head_dim": 80, "num_attention_heads": 3, "hidden_size": 72},
    "biases_head_dim_24": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic_beyond": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "llama3": {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32}},
    "yarn": {"rope_scaling": _YARN, "max_position_embeddings": 1024},
    "yarn_options": {"rope_scaling": {**_YARN, **_YARN_OPTIONS}, "max_position_embeddings": 1024},
    "yarn_mscale": {
        "rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
        "max_position_embeddings": 1024,
    },
}


def config_of(case: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a case."""
    return {"model_type": "llama", "hidden_act": "silu", **SMALL, **CASES[case], **changes}


def weights_of(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random float32 tensors, large enough that every part of the model moves the logits."""
    tensors = {}
    for index, (name, shape) in enumerate(sorted(checkpoint_shapes(config).items())):
        values = np.random.default_rng(index).standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith(".weight") and "embed" not in name:
            values = values * 1.5 / np.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors


def tokens_of(config: Mapping[str, Any]) -> np.ndarray:
    """Two sequences of 40 tokens."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], (2, 40)).astype(np.int32)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face checkpoint: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(weights_of(config) if tensors is None else tensors), folder / "model.safetensors")
    return folder
