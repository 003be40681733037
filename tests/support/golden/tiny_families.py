"""A tiny model of every family, and what it is compared with."""

import copy
from typing import Any

import numpy as np

_SMALL = {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Families in which one layer in four is of another kind.
_FOUR_LAYERS = {"num_hidden_layers": 4}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0]}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_QWEN_EXPERTS = {"head_dim": 16, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3}
# Family, case -> changes of the small config, in the form in which checkpoints have them.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama padded": {"head_dim": 80},
    "mistral": {"sliding_window": 10, "head_dim": 12},
    "mistral full": {"sliding_window": None, "head_dim": 12},
    "ministral3": {"head_dim": 16, "rope_parameters": _YARN},
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3 padded": {"head_dim": 96},
    "smollm3": _FOUR_LAYERS,
    "seed_oss": {"head_dim": 12},
    "phi3": {},
    "phi3 longrope": {
        "rope_scaling": _LONGROPE, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 24,
        "sliding_window": 30,
    },
    "granite": {
        "embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0
    },
    "olmo2": {},
    "olmo3": {**_FOUR_LAYERS, "sliding_window": 10, "rope_scaling": {**_LLAMA3}},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "exaone4": {**_FOUR_LAYERS, "sliding_window": 10},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_scaling": {"type": "dynamic", "alpha": 100.0, "factor": 1.0}},
    "ernie4_5": {"head_dim": 16},
    "cohere": {},
    "cohere2": {**_FOUR_LAYERS, "head_dim": 16, "sliding_window": 10},
    "helium": {"head_dim": 12},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {**_QWEN_EXPERTS, "norm_topk_prob": False},
    "qwen3_moe normalized": {**_QWEN_EXPERTS, "norm_topk_prob": True},
    "gpt_oss": {
        "head_dim": 16, "intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 10,
        "rope_theta": 150000, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip


# Families that transformers has no code of: Llamas whose tensors and keys have other names.
RENAMED: dict[str, dict[str, Any]] = {
    "iquestcoder": {},
    "internlm3": {"qkv_bias": True, "bias": False},
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5, "activation_function": "silu"},
}


def family_fields(case: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a case, which says no more than published ones do."""
    return copy.deepcopy({**_SMALL, **(CASES | RENAMED)[case], **changes, "model_type": case.split()[0]})


def family_tokens(rows: int = 2, length: int = 40) -> np.ndarray:
    """Random ids, none of them special."""
    return np.random.default_rng(7).integers(3, _SMALL["vocab_size"], (rows, length)).astype(np.int32)
