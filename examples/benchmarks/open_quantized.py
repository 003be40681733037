"""How long a checkpoint that others quantized takes to open, beside a folder of ours with the same weights.

    python examples/benchmarks/open_quantized.py [--layers 32] [--work FOLDER]

Writes a compressed-tensors checkpoint (INT4 in groups of 128, FP8 activations) of Llama-3-8B's shapes with random
codes, and what ``save`` makes of it. Each is then opened and run by a process of its own, in turn, ``--repeats``
times: seconds, tokens a second of greedy decoding, and the host memory that the process took at most. Files come
from the page cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from fireq_jax import AutoModelForCausalLM, generate
from fireq_jax.json_files import write_json

FIELDS = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 5e5,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
GROUP = 128
LINEARS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
            "input_activations": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True
            },
        }
    },
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--layers", type=int, default=32)
    parse.add_argument("--repeats", type=int, default=2)
    parse.add_argument("--new-tokens", type=int, default=128)
    parse.add_argument("--work", type=Path, help="where the checkpoints are written; a temporary folder if not given")
    parse.add_argument("--json", type=Path)
    parse.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parse.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    return parse


def write_checkpoint(folder: Path, layers: int) -> None:
    """A checkpoint of random codes; all layers hold the same, which changes neither bytes nor work."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    layer: dict[str, np.ndarray] = {}
    for name, (n, k) in LINEARS.items():
        nibbles = random.integers(1, 16, (n, k // 8, 8), np.uint8).astype(np.uint32)  # codes -7 to 7, plus 8
        layer[f"{name}.weight_packed"] = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
        layer[f"{name}.weight_packed"] = layer[f"{name}.weight_packed"].view(np.int32)
        scales = random.uniform(0.5, 1.5, (n, k // GROUP)) / (4 * np.sqrt(k))
        layer[f"{name}.weight_scale"] = scales.astype(ml_dtypes.bfloat16)
        layer[f"{name}.weight_shape"] = np.array([n, k], np.int64)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        layer[name] = np.ones(4096, ml_dtypes.bfloat16)
    places: dict[str, str] = {}

    def write(file: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    for index in range(layers):
        write(f"layer-{index}.safetensors", {f"model.layers.{index}.{name}": array for name, array in layer.items()})
    shape = FIELDS["vocab_size"], FIELDS["hidden_size"]
    embedding = (random.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    write("ends.safetensors", {**ends, "model.norm.weight": np.ones(4096, ml_dtypes.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    fields = {**FIELDS, "num_hidden_layers": layers, "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(fields))


def run_child(folder: Path, new_tokens: int, save: Path | None) -> None:
    """Open a folder, print what it took as JSON, and save it to ``save``."""
    jax.block_until_ready(jnp.zeros(1))  # the device is there
    started = time.perf_counter()
    model = jax.block_until_ready(AutoModelForCausalLM.from_pretrained(folder))
    opened = time.perf_counter() - started
    result: dict[str, Any] = {
        "seconds": opened,
        "host bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if save is not None:
        model.save(save)
    prompt, seconds = np.arange(64)[None], []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(generate(model, prompt, max_new_tokens=new_tokens, eos_token_ids=()).sequences)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(result | {"tokens/s": new_tokens / min(seconds), "model bytes": model.nbytes}))


def main() -> None:
    """Write, open in turn, and print one line for each folder."""
    args = parser().parse_args()
    if args.child is not None:
        run_child(args.child, args.new_tokens, args.save)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        theirs, ours = work / "compressed-tensors", work / "ours"
        write_checkpoint(theirs, args.layers)

        def child(folder: Path, *more: str) -> dict[str, float]:
            command = [sys.executable, __file__, "--child", str(folder), "--new-tokens", str(args.new_tokens), *more]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])

        child(theirs, "--save", str(ours))
        runs = [(child(theirs), child(ours)) for _ in range(args.repeats)]
    rows = [{key: median(run[i][key] for run in runs) for key in runs[0][i]} for i in range(2)]
    for name, row in zip(("compressed-tensors", "ours"), rows, strict=True):
        print(
            f"{name:20} {row['seconds']:6.1f} s to open, {row['tokens/s']:6.1f} tokens/s, "
            f"{row['host bytes'] / 1e9:5.1f} GB of host memory, model {row['model bytes'] / 1e9:.2f} GB"
        )
    print(f"ratio {rows[0]['seconds'] / rows[1]['seconds']:.2f}")
    if args.json:
        write_json(args.json, {"runs": runs})


if __name__ == "__main__":
    main()
