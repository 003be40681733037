"""Tiny GGUF files, written with the gguf package's own writer, and the floats that they stand for."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

TINY = {
    "hidden_act": "silu", "vocab_size": 67, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TURNED = ("llama", "granite", "smollm3")
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
# Of a block of 256: bytes of which two are a factor in float16, and where those are.
_K_BLOCKS = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}


def write_gguf(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: str = "F32", *,
    said: Mapping[str, Any] | None = None, more: Mapping[str, np.ndarray] | None = None, per_part: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A model's file; returns the checkpoint's tensors as the file has them.

    Args:
        path: of the file; of several, NAME-00001-of-... beside it.
        config: a config.json.
        tensors: of the Hugging Face checkpoint.
        kind: of all matrices; vectors are F32.
        said: values by key to add or replace; None leaves one out.
        more: tensors by the file's names, to add or replace; in float32.
        per_part: tensors of a file; 0 for a single one.
    """
    name = config["model_type"]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=per_part)
    for key, value in {**_metadata(name, config), **(said or {})}.items():
        if value is not None:
            _add(writer, key, value)
    written, replaced = {}, dict(more or {})
    for theirs, values in tensors.items():
        ours = gguf_name(theirs)
        turned = name in TURNED and re.search(r"[qk]_proj\.", theirs)
        heads = config["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"]
        data, floats = _encoded(_turn(values, heads) if turned else values, kind if values.ndim > 1 else "F32")
        written[theirs] = _turn(floats, heads, back=True) if turned else floats
        if ours not in replaced:
            stored = None if data.dtype == np.float32 else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(ours, data, raw_dtype=stored)
    for ours, values in replaced.items():
        writer.add_tensor(ours, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def gguf_name(theirs: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = theirs.rpartition(".")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem):
        return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{kind}"
    return f"{_OUTSIDE[stem]}.{kind}"


def _metadata(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": width,
        "vocab_size": config["vocab_size"],
        **({"attention.key_length": width, "attention.value_length": width} if "head_dim" in config else {}),
        **{key: config[theirs] for key, theirs in _SCALES.items() if theirs in config},
    }
    ids = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{name}.{key}": value for key, value in values.items()} | {
        f"tokenizer.ggml.{ours}_token_id": config[f"{theirs}_token_id"] for ours, theirs in ids.items()
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _turn(rows: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows of pairs (i, i + H/2) as pairs (2i, 2i + 1), or back."""
    half = len(rows) // heads // 2
    split = rows.reshape(heads, *((half, 2) if back else (2, half)), *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _encoded(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What is stored, and the floats that it stands for."""
    if kind == "F32":
        return values, values
    if kind == "BF16":
        rounded = values.astype(ml_dtypes.bfloat16)
        return rounded.view(np.uint8), rounded.astype(np.float32)
    known = gguf.GGMLQuantizationType[kind]
    if kind in _K_BLOCKS:  # which the package can only read
        size, factors = _K_BLOCKS[kind]
        blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // 256, size), np.uint8)
        for at in factors:
            blocks[:, at : at + 2] = np.full((len(blocks), 1), 2e-4, np.float16).view(np.uint8)
        data = blocks.reshape(len(values), -1)
    else:
        data = gguf.quantize(values, known)
    return data, gguf.dequantize(data, known)
