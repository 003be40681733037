"""The peer of ``end_to_end.py``: Llama-3-8B in bf16 by transformers and PyTorch, random weights.

    python examples/benchmarks/transformers_peer.py [--prefill 16x1024,16x4096] [--decode 1x1024,64x1024]

Prefill is eager with PyTorch's scaled-dot-product attention (nothing but large kernels, so compiling
would change little) and makes the logits of the last token only. Decode is one greedy step over a
static cache under ``torch.compile(mode="reduce-overhead")``, that is, in CUDA graphs.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from end_to_end import MODELS, shapes
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache


def build(name: str) -> Any:
    """The model of ``end_to_end.MODELS`` on the GPU."""
    ours = MODELS[name]
    config = LlamaConfig(
        vocab_size=ours.vocab_size, hidden_size=ours.hidden_size, intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=ours.max_position_embeddings,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds between events around a call, after two to warm up."""
    times = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--prefill", type=shapes, default=shapes("16x1024,16x2048,16x4096,1x1024,1x8192"))
    parser.add_argument("--decode", type=shapes, default=shapes("1x1024,16x1024,64x1024"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, transformers {transformers.__version__}")
    model = build(args.model)
    for batch, length in args.prefill:
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
        ms = median_ms(lambda ids=ids: model(ids, logits_to_keep=1, use_cache=True), args.repeats)
        print(f"prefill {batch:4} x {length:6} {ms:10.3f} ms {batch * length / ms * 1e3:12.1f} tokens/s", flush=True)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for batch, context in args.decode:
        cache = StaticCache(config=model.config, max_cache_len=context + 64)
        prompt = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
        model(prompt, past_key_values=cache, logits_to_keep=1)
        ids = prompt[:, :1].contiguous()
        position = torch.full((1, 1), context, device="cuda")

        def decode(ids: Any = ids, cache: Any = cache, position: Any = position) -> Any:
            return step(ids, past_key_values=cache, position_ids=position).logits[:, -1].argmax(-1)

        ms = median_ms(decode, 20)
        print(f"decode  {batch:4} x {context:6} {ms:10.3f} ms {batch / ms * 1e3:12.1f} tokens/s", flush=True)
        del cache


if __name__ == "__main__":
    main()
