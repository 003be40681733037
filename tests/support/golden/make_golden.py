"""Make ``logits.npz`` and ``families.npz``: what transformers computes for the tiny random models (needs torch).

    python tests/support/golden/make_golden.py

The tests compare with these, and live as well where torch is installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_families import CASES as FAMILY_CASES
from tiny_families import family_fields, family_tokens
from tiny_llama import CASES, config_of, tokens_of, weights_of

GOLDEN = Path(__file__).with_name("logits.npz")
FAMILIES = Path(__file__).with_name("families.npz")
NEW_TOKENS = 8
# Logits of these positions are kept: the last ones depend on all others.
KEPT = slice(-8, None)


def reference_model(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """transformers' float32 model, with just these tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    described = AutoConfig.for_model(**config)
    with torch.device("meta"):
        family = type(AutoModelForCausalLM.from_config(described))
    # As from a folder, so that names and shapes become those of its modules as in any checkpoint.
    model, loading = family.from_pretrained(
        None, config=described, state_dict={k: torch.from_numpy(v) for k, v in tensors.items()}, dtype=torch.float32,
        attn_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert not any(loading.values()), loading
    return model.eval()


def reference_text(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The most likely next tokens, one after the other, [B, ``NEW_TOKENS``]."""
    import torch

    ids = torch.from_numpy(tokens).long()
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, tokens.shape[1] :].numpy()


def reference_logits(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """float32 logits of transformers' model."""
    import torch

    model = reference_model(config, tensors)
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs |= {"attention_mask": mask, "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array).long() for name, array in inputs.items()}).logits.numpy()


def main() -> None:
    configs = {case: config_of(case) for case in CASES}
    logits = {case: reference_logits(c, weights_of(c), tokens_of(c))[:, KEPT] for case, c in configs.items()}
    np.savez_compressed(GOLDEN, **logits)
    kept: dict[str, np.ndarray] = {}
    for case in FAMILY_CASES:
        fields = family_fields(case)
        tensors, tokens = weights_of(fields), family_tokens()
        kept[f"{case}.logits"] = reference_logits(fields, tensors, tokens)[:, KEPT]
        kept[f"{case}.text"] = reference_text(reference_model(fields, tensors), tokens)
    np.savez_compressed(FAMILIES, **kept)


if __name__ == "__main__":
    main()
