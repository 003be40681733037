"""Make ``logits.npz``: what transformers computes for the tiny random Llamas (needs torch).

    python tests/support/golden/make_golden.py

The tests compare with these, and live as well where torch is installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_llama import CASES, config_of, tokens_of, weights_of

GOLDEN = Path(__file__).with_name("logits.npz")
# Logits of these positions are kept: the last ones depend on all others.
KEPT = slice(-8, None)


def reference_logits(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """What transformers' LlamaForCausalLM computes in float32."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager")).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs |= {"attention_mask": mask, "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array).long() for name, array in inputs.items()}).logits.numpy()


if __name__ == "__main__":
    configs = {case: config_of(case) for case in CASES}
    logits = {case: reference_logits(c, weights_of(c), tokens_of(c))[:, KEPT] for case, c in configs.items()}
    np.savez_compressed(GOLDEN, **logits)
