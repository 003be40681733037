"""``config.json`` of an exported model: the one that came with it, or one made from our ``ModelConfig``."""

import dataclasses
from pathlib import Path
from typing import Any

from fireq_jax.checkpoints.folder import MANIFEST
from fireq_jax.config_fields import quote
from fireq_jax.json_files import errors_name, is_file, read_json
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import ModelConfig, RopeConfig
from fireq_jax.models.family import NAMES

# Families whose config.json is all in ModelConfig, and the class that other engines look for.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ELSEWHERE = ("quantization_config", "compression_config")


def exported_config(folder: Path, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of ``config``, without a quantized format.

    Args:
        folder: of a converted model; its own config.json, which came with the checkpoint, says what others need to
            know and this project does not.
        config: the architecture to be described.
        dtype: of the floats, by NumPy's name.

    Raises:
        ValueError: naming the family, if there is no such file and none can be written, and the first entry that
            does not describe ``config``.
    """
    path = folder / "config.json"
    if is_file(path):
        fields = {name: value for name, value in read_json(path).items() if name not in _ELSEWHERE}
    elif config.model_type in _CLASSES:
        fields = huggingface_fields(config)
    else:
        raise ValueError(
            f"{folder} has no config.json, and that of a {config.model_type} cannot be written, only one of "
            f"{', '.join(_CLASSES)}; put the original model's there"
        )
    if config.model_type in _CLASSES:
        fields.setdefault("architectures", [_CLASSES[config.model_type]])
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    fields["eos_token_id"] = _alone(config.eos_token_ids)
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = dtype
    with errors_name(path):
        found = config_from_huggingface(fields)
    for field in dataclasses.fields(ModelConfig):
        said, wanted = getattr(found, field.name), getattr(config, field.name)
        if said != wanted:
            raise ValueError(
                f"{path} of a {config.model_type} says {field.name} {quote(said)}; "
                f"expected {quote(wanted)}, as in {MANIFEST}"
            )
    return fields


def huggingface_fields(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` in the form that transformers 4 writes and 5 reads, of a family of :data:`_CLASSES`."""
    fields = {theirs: getattr(config, ours) for theirs, ours in NAMES.items()}
    fields |= {
        "architectures": [_CLASSES[config.model_type]],
        "eos_token_id": _alone(config.eos_token_ids),
        "head_dim": config.width,
        "hidden_act": config.activation,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    if config.model_type != "llama":
        fields["sliding_window"] = config.window
    if config.model_type.startswith("qwen"):
        fields |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    if config.windowed:
        fields["layer_types"] = ["sliding_attention" if one else "full_attention" for one in config.windowed]
    return fields


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    always = {"rope_type", "factor", *(("low_freq_factor", "high_freq_factor") if rope.rope_type == "llama3" else ())}
    scaling = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(rope)
        if (value := getattr(rope, field.name)) != field.default or field.name in always
    }
    return {name: value for name, value in scaling.items() if name not in ("theta", "rotary_dim")}


def _alone(ids: tuple[int, ...]) -> Any:
    """An id, several, or null."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
