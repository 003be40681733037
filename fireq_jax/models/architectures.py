"""The model families: what each one's config.json leaves unsaid, and what its layers and checkpoints do differently.

Adding one that needs no new maths is one entry of ``FAMILIES``, and one case in the tests. Defaults differ from family
to family: they are those of transformers' configuration classes.
"""

import math
from collections.abc import Mapping
from typing import Any

from fireq_jax.config_fields import is_a, quote
from fireq_jax.models.config import ORIGINAL_POSITIONS, ExpertsConfig, ModelConfig, RopeConfig
from fireq_jax.models.family import (
    HEAD,
    Family,
    Fields,
    HasFields,
    all_but_every,
    config_of,
    fields_of,
    head_dim_of,
    positive,
    rope_parameters,
    tensors_of,
    window_layers,
)
from fireq_jax.models.tensor_source import TensorTable
from pallas_kernels.matmul_epilogue import GATE_LIMIT, SILU_SLOPE


def config_from_huggingface(config: Fields | HasFields) -> ModelConfig:
    """Read a config of transformers: the object, or the fields of a ``config.json`` in its v4 or v5 form.

    Raises:
        ValueError: for a family that is not there, or an option that this project does not have.
    """
    fields = fields_of(config)
    return config_of(family_of(fields), fields)


def tensor_table(fields: Fields, config: ModelConfig) -> TensorTable:
    """Where a checkpoint with this config.json has the tensors of ``config``, and how they are read."""
    return tensors_of(family_of(fields), fields, config)


def checkpoint_shapes(fields: Fields) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this config.json."""
    config = config_from_huggingface(fields)
    return tensor_table(fields, config).shapes(config.num_layers)


def family_of(fields: Fields) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: naming those that are there, if it is none of them.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type is {quote(model_type)}; expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def _qwen_windows(fields: Fields) -> dict[str, Any]:
    first = fields["max_window_layers"]
    if not is_a(first, int) or first < 0:
        raise ValueError(f"max_window_layers is {quote(first)}; expected 0 or a positive whole number")
    return window_layers(fields, lambda i: i >= first)


def _smollm3(fields: Fields) -> dict[str, Any]:
    count, rotated = fields["num_hidden_layers"], fields.get("no_rope_layers")
    if rotated is None:
        rotated = [int(all_but_every(fields["no_rope_layer_interval"])(i)) for i in range(count)]
    numbers = isinstance(rotated, list) and all(is_a(each, int) and each in (0, 1) for each in rotated)
    if not numbers or len(rotated) != count:
        raise ValueError(f"no_rope_layers is {quote(rotated)}; expected {count} numbers, 1 for RoPE and 0 for none")
    windows = window_layers(fields, lambda i: not rotated[i])
    return {"rotated": tuple(map(bool, rotated)), **windows}


def _granite(fields: Fields) -> dict[str, Any]:
    positive(fields, "residual_multiplier")  # which the branches' last matrices are read with
    return {
        "embedding_scale": positive(fields, "embedding_multiplier"),
        "attention_scale": positive(fields, "attention_multiplier"),
        "logit_scale": 1 / positive(fields, "logits_scaling"),
    }


def _gemma(fields: Fields) -> dict[str, Any]:
    # Checkpoints from before transformers told them apart say "gelu" and mean the other.
    if fields["hidden_act"] not in ("gelu_pytorch_tanh", "gelu"):
        raise ValueError(f"hidden_activation is {quote(fields['hidden_act'])}; expected 'gelu_pytorch_tanh'")
    return {"activation": "gelu_tanh", "embedding_scale": math.sqrt(fields["hidden_size"])}


def _gemma2(fields: Fields) -> dict[str, Any]:
    return {
        **_gemma(fields),
        **window_layers(fields, all_but_every(fields["sliding_window_pattern"])),
        "norm_order": "sandwich",
        "attention_scale": positive(fields, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields["attn_logit_softcapping"],
        "logit_softcap": fields["final_logit_softcapping"],
    }


def _olmo2(fields: Fields) -> dict[str, Any]:
    return {"norm_order": "post", "head_norm": "across_heads"}


def _exaone4(fields: Fields) -> dict[str, Any]:
    pattern = fields["sliding_window_pattern"]
    if isinstance(pattern, str):  # such as "LLLG"
        if pattern.strip("L") != "G" or not pattern.endswith("G"):
            raise ValueError(f"sliding_window_pattern is {quote(pattern)}; expected a number, or Ls and then a G")
        pattern = len(pattern)
    every = (lambda i: False) if fields["sliding_window"] is None else all_but_every(pattern)
    windows = window_layers(fields, every)
    rotated = () if fields["sliding_window"] is None else _only_in_windows(fields, windows)
    return {**windows, "rotated": rotated, "norm_order": "post", "head_norm": "before_rope"}


def _cohere(fields: Fields) -> dict[str, Any]:
    return {
        "norm_order": "parallel",
        "norm_kind": "layer",
        "logit_scale": positive(fields, "logit_scale"),
    }


def _cohere2(fields: Fields) -> dict[str, Any]:
    windows = window_layers(fields, all_but_every(fields["sliding_window_pattern"]))
    return {**_cohere(fields), **windows, "rotated": _only_in_windows(fields, windows)}


def _only_in_windows(fields: Fields, windows: Fields) -> tuple[bool, ...]:
    """Layers with RoPE, where those that see everything have none."""
    return windows["windowed"] if windows else (False,) * fields["num_hidden_layers"]


def _query_growth(fields: Fields) -> float:
    parameters = rope_parameters(fields)
    if parameters.get("llama_4_scaling_beta") is None:
        return 0.0
    positive(parameters, ORIGINAL_POSITIONS)
    return positive(parameters, "llama_4_scaling_beta")


def _hunyuan(fields: Fields) -> dict[str, Any]:
    options: dict[str, Any] = {"head_norm": "after_rope"}
    parameters = rope_parameters(fields)
    if parameters.get("rope_type", parameters.get("type")) == "dynamic" and parameters.get("alpha"):
        # A fixed NTK factor under the name of the dynamic one.
        rest = {name: value for name, value in parameters.items() if name != "alpha"}
        said, head_dim = RopeConfig.from_huggingface({**fields, "rope_scaling": rest}), head_dim_of(fields)
        if said.factor != 1 or head_dim <= 2:
            raise ValueError(f"rope factor is {said.factor} and head_dim {head_dim}; beside alpha 1 and more than 2")
        theta = said.theta * positive(parameters, "alpha") ** (head_dim / (head_dim - 2))
        options["rope"] = RopeConfig(theta=theta)
    return options


def _experts(fields: Fields, **options: bool) -> ExpertsConfig:
    count, chosen = fields["num_local_experts"], fields["num_experts_per_tok"]
    if not (is_a(count, int) and is_a(chosen, int)):
        raise ValueError(
            f"num_local_experts is {quote(count)} and num_experts_per_tok {quote(chosen)}; expected whole numbers"
        )
    return ExpertsConfig(count, chosen, **options)


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    if fields["mlp_only_layers"] or not is_a(fields["decoder_sparse_step"], int) or fields["decoder_sparse_step"] != 1:
        raise ValueError(
            f"mlp_only_layers is {quote(fields['mlp_only_layers'])} and decoder_sparse_step "
            f"{quote(fields['decoder_sparse_step'])}; only experts in all layers are supported"
        )
    if not is_a(fields["norm_topk_prob"], bool):
        raise ValueError(f"norm_topk_prob is {quote(fields['norm_topk_prob'])}; expected true or false")
    windows = window_layers(fields, lambda i: True)
    return {
        "intermediate_size": fields["moe_intermediate_size"],
        "head_norm": "before_rope",
        "experts": _experts(fields, normalized=fields["norm_topk_prob"]),
        **windows,
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    for name, only in (("swiglu_alpha", SILU_SLOPE), ("swiglu_limit", GATE_LIMIT), ("hidden_act", "silu")):
        if fields[name] != only:
            raise ValueError(f"{name} is {quote(fields[name])}; only {only!r} is supported")
    return {
        "activation": "clamped_silu",
        "mlp_bias": True,
        "sinks": True,
        "experts": _experts(fields, router_bias=True),
        **window_layers(fields, lambda i: i % 2 == 0),
    }


# What training alone has a use for.
_ROUTER: Fields = {"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}
_EXPERT_KEYS = {"num_experts": "num_local_experts"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    ORIGINAL_POSITIONS: 4096,
}  # fmt: skip
_QWEN: Fields = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA: Fields = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA2: Fields = {
    **_GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3: Fields = {
    **_GEMMA2, "sliding_window_pattern": 6, "_sliding_window_pattern": 6, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
_GEMMA_KEYS = {"hidden_activation": "hidden_act"}
_COHERE_KEYS = {"layer_norm_eps": "rms_norm_eps"}
_MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL_POSITIONS: 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_GEMMA_NAMES = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_POST_NAMES = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_GLM: Fields = {
    "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True, "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
}  # fmt: skip
_COHERE: Fields = {
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 5e5,
}  # fmt: skip
_EXAONE_NAMES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    **{f"self_attn.{part}_proj": f"attn.attention.{part}_proj" for part in "qkv"},
    "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "iquestcoder": Family(),
    "mistral": Family(
        {"sliding_window": 4096, "layer_types": None, "num_key_value_heads": 8},
        options=lambda fields: window_layers(fields, lambda i: True),
    ),
    "ministral3": Family(
        {"head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None, "layer_types": None, "num_key_value_heads": 8,
         "rope_parameters": _MINISTRAL_ROPE},
        options=lambda fields: {**window_layers(fields, lambda i: True), "query_growth": _query_growth(fields)},
    ),
    "internlm3": Family(
        {"rms_norm_eps": 1e-5, "qkv_bias": False, "bias": False},
        options=lambda fields: {
            "attention_bias": fields["qkv_bias"], "output_bias": fields["bias"], "mlp_bias": fields["bias"]
        },
    ),
    "exaone": Family(
        {"rms_norm_eps": 1e-5, "embed_dropout": 0.0},
        {
            "num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        names=_EXAONE_NAMES,
        prefix="transformer.h.{index}.",
        globals={
            "embed_tokens": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight",
            "lm_head": HEAD,
        },
    ),
    "qwen2": Family(
        _QWEN, options=lambda fields: {"attention_bias": True, "output_bias": False, **_qwen_windows(fields)}
    ),
    "qwen3": Family(
        {**_QWEN, "head_dim": 128}, options=lambda fields: {"head_norm": "before_rope", **_qwen_windows(fields)}
    ),
    "qwen3_moe": Family(
        {
            **_ROUTER, "use_sliding_window": False, "sliding_window": 4096, "layer_types": None,
            "max_window_layers": None, "num_key_value_heads": 4, "moe_intermediate_size": 768,
            "num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False,
            "decoder_sparse_step": 1, "mlp_only_layers": None,
        },
        _EXPERT_KEYS,
        _qwen3_moe,
        names={
            "mlp.router": "mlp.gate",
            **{f"mlp.experts.{part}_proj": f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")},
        },
    ),
    "mixtral": Family(
        {
            **_ROUTER, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "layer_types": None,
            "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        },
        _EXPERT_KEYS,
        lambda fields: {"experts": _experts(fields), **window_layers(fields, lambda i: True)},
        names={
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.gate_proj": "block_sparse_moe.experts.{expert}.w1",
            "mlp.experts.up_proj": "block_sparse_moe.experts.{expert}.w3",
            "mlp.experts.down_proj": "block_sparse_moe.experts.{expert}.w2",
        },
    ),
    "gpt_oss": Family(
        {
            **_ROUTER, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1.5e5, "rope_parameters": _GPT_OSS_ROPE,
            "attention_bias": True, "sliding_window": 128, "layer_types": None, "num_key_value_heads": 8,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
            "initial_context_length": 4096, "experts_per_token": 4,
        },
        _EXPERT_KEYS,
        _gpt_oss,
        stacked_experts=True,
    ),
    "smollm3": Family(
        {
            "tie_word_embeddings": True, "rope_theta": 2e6, "use_sliding_window": False, "sliding_window": None,
            "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4, "num_key_value_heads": 4,
            "max_window_layers": None,
        },
        options=_smollm3,
    ),
    "seed_oss": Family(
        {"head_dim": 128, "attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.0},
        options=lambda fields: {"output_bias": fields["attention_out_bias"]},
    ),
    "phi3": Family(
        {
            "rms_norm_eps": 1e-5, "sliding_window": None, "layer_types": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            ORIGINAL_POSITIONS: 4096, "partial_rotary_factor": 1.0,
        },
        options=lambda fields: window_layers(fields, lambda i: True),
        fused_qkv=True,
        partial_rope=True,
        fused_gate_up=True,
    ),
    "granite": Family(
        {
            "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        options=_granite,
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, options=_olmo2, names=_POST_NAMES),
    "olmo3": Family(
        {
            "rms_norm_eps": 1e-5, "sliding_window": 4096, "layer_types": None, "rope_theta": 5e5,
        },
        options=lambda fields: {**_olmo2(fields), **window_layers(fields, all_but_every(4))},
        names=_POST_NAMES,
        plain_local_rope=True,
    ),
    "gemma": Family(_GEMMA, _GEMMA_KEYS, _gemma, gain_offset=1.0),
    "gemma2": Family(_GEMMA2, _GEMMA_KEYS, _gemma2, names=_GEMMA_NAMES, gain_offset=1.0),
    "gemma3_text": Family(
        _GEMMA3,
        _GEMMA_KEYS,
        lambda fields: {**_gemma2(fields), "head_norm": "before_rope"},
        names=_GEMMA_NAMES,
        gain_offset=1.0,
    ),
    "glm": Family(
        _GLM,
        options=lambda fields: {"output_bias": False},
        fused_gate_up=True,
        interleaved_rope=True,
        partial_rope=True,
    ),
    "glm4": Family(
        _GLM,
        options=lambda fields: {"output_bias": False, "norm_order": "sandwich"},
        names={"attention_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"},
        fused_gate_up=True,
        interleaved_rope=True,
        partial_rope=True,
    ),
    "exaone4": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
        options=_exaone4,
        names=_POST_NAMES,
    ),
    "hunyuan_v1_dense": Family(
        {"rms_norm_eps": 1e-5, "eod_token_id": 3},
        options=_hunyuan,
        names={"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"},
    ),
    "ernie4_5": Family(
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 5e5, "head_dim": 128, "use_bias": False,
         "num_key_value_heads": 2},
        options=lambda fields: dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), fields["use_bias"]),
        interleaved_rope=True,
    ),
    "cohere": Family(_COHERE, _COHERE_KEYS, _cohere, interleaved_rope=True),
    "cohere2": Family(
        {**_COHERE, "rope_theta": 1e4, "head_dim": 128, "sliding_window": 4096, "layer_types": None,
         "sliding_window_pattern": 4},
        _COHERE_KEYS,
        _cohere2,
        interleaved_rope=True,
    ),
    "helium": Family(
        {"rms_norm_eps": 1e-8, "head_dim": 128, "rope_theta": 1e5},
        options=lambda fields: {"output_bias": False},
        interleaved_rope=True,
    ),
}  # fmt: skip
