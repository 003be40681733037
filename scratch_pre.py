"""Variants of the prefill kernel on a device: errors against float32, then times. Arguments: [check] [time] [names]"""

import concurrent.futures
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from examples.benchmarks import attention as bench
from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import attention_reference
from pallas_kernels.sm90.attention import prefill

BASE = prefill.Config(stages=3, one_barrier=True)
ALONG = dataclasses.replace(BASE, pipeline=3, sums=True)
VARIANTS = {
    "main": prefill.Config(),
    "one barrier": BASE,
    "sums": dataclasses.replace(BASE, sums=True),
    "pipeline 3": ALONG,
    "turns": dataclasses.replace(ALONG, pipeline=4, turns=True),
    "pipeline 4": dataclasses.replace(ALONG, pipeline=4),
    "lazy": dataclasses.replace(ALONG, pipeline=4, lazy=True),
}
# length, heads, kv_heads, slots, lengths, starts, causal, window, outliers
CASES = {
    "causal": (512, 8, 2, 512, (512, 511), (0, 0), True, None, False),
    "many blocks": (512, 32, 8, 512, (512, 0, 300), (0, 0, 0), True, None, False),
    "not causal": (256, 8, 2, 640, (640, 1, 0), (0, 0, 0), False, None, False),
    "window": (512, 8, 2, 1024, (1024, 500), (512, 0), True, 100, False),
    "chunk, outliers": (300, 8, 2, 1000, (1000, 129), (700, 1), True, None, True),
    "long, outliers": (128, 8, 2, 2048, (2048,), (1920,), True, None, True),
    "long": (256, 8, 2, 4096, (4096, 3000), (3840, 2744), True, None, False),
    "short": (77, 8, 2, 77, (77, 30), (0, 0), True, None, False),
}


def operands(case):
    length, heads, kv_heads, slots, lengths, starts, _, _, outliers = case
    keys = jax.random.split(jax.random.key(slots + length), 3)
    q = formats.quantize_fp8(bench.random_rows(keys[0], (len(lengths), length, heads, 128), outliers))
    lengths, starts = jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32)
    empty = (jnp.arange(slots) >= lengths[:, None])[:, None, :, None]
    cache = []
    for key in keys[1:]:
        rows = formats.quantize_kv(bench.random_rows(key, (lengths.shape[0], kv_heads, slots, 128), outliers), "int4")
        cache.append(ScaledArray(rows.values, jnp.where(empty, jnp.nan, rows.scale)))
    return q, *cache, starts, lengths


def check(name: str, names) -> str:
    case = CASES[name]
    q, k, v, starts, lengths = operands(case)
    causal, window, outliers = case[6:]
    options = {
        "query_start": starts, "kv_lengths": lengths, "scale": bench.SCALE * (0.02 if outliers else 1.0),
        "causal": causal, "window": window,
    }  # fmt: skip
    with jax.default_matmul_precision("highest"):
        exact = attention_reference(ScaledArray(formats.dequantize(q), None), k, v, out_dtype=jnp.float32, **options)
        reference = attention_reference(q, k, v, out_dtype=jnp.float32, **options)

    def errors(x):
        """The worst sequence's relative error and the worst row's."""
        x, y = (np.asarray(a, np.float32) for a in (x, exact))
        if not np.isfinite(x).all():
            return "NOT FINITE"
        difference, size = np.linalg.norm(x - y, axis=-1), np.linalg.norm(y, axis=-1)
        whole = [np.linalg.norm(d) / max(np.linalg.norm(s), 1e-30) for d, s in zip(difference, size, strict=True)]
        return f"{max(whole):.4f} {float((difference / np.maximum(size, 1e-6)).max()):.3f}"

    line = f"{name:16s} reference {errors(reference)}"
    for variant in names:
        run = functools.partial(prefill.prefill_attention, config=VARIANTS[variant], **options)
        # Twice: the second finds the outputs' memory in another state.
        first, second = np.asarray(run(q, k, v), np.float32), np.asarray(run(q, k, v), np.float32)
        line += f" | {variant} {errors(first)}" + ("" if (first == second).all() else " NOT REPEATABLE")
    return line


def compiled_loop(run, args, iterations: int = 10):
    @jax.jit
    def loop(args):
        def body(_, token):
            tied, token = jax.lax.optimization_barrier((args, token))
            return token + run(*tied).reshape(-1)[0].astype(jnp.float32)

        return jax.lax.fori_loop(0, iterations, body, jnp.float32(0))

    return loop.lower(args).compile(), args, iterations


def measure(loop, args, iterations: int) -> float:
    loop(args).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        loop(args).block_until_ready()
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) * 1e3 / iterations


def main() -> None:
    names = [x for x in sys.argv[1:] if x in VARIANTS] or list(VARIANTS)
    what = [x for x in sys.argv[1:] if x in ("check", "time")] or ["check", "time"]
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(12)
    if "check" in what:
        # Memory that later arrays get is full of NaN.
        jax.block_until_ready(jnp.full((1 << 28,), jnp.nan))
        print("errors of the worst sequence and of the worst row")
        for line in pool.map(lambda case: check(case, names), CASES):
            print(line, flush=True)
    if "time" not in what:
        return
    for batch, length in ((16, 1024), (4, 4096), (1, 16384)):
        start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
        tera = 4e-9 * bench.HEAD_DIM * bench.HEADS * batch * length * (length + 1) / 2
        q = formats.quantize_fp8(jax.random.normal(jax.random.key(0), (batch, length, bench.HEADS, bench.HEAD_DIM)))
        cache = bench.random_cache(1, batch, length)
        runs = {}
        for name in names:
            run = functools.partial(
                prefill.prefill_attention, query_start=start, kv_lengths=lengths, scale=bench.SCALE,
                config=VARIANTS[name],
            )  # fmt: skip
            runs[name] = (run, (q, *cache))
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        runs["cudnn"] = (attend, bench.bf16_operands(0, batch, length, length))
        loops = dict(zip(runs, pool.map(lambda run: compiled_loop(*run), runs.values()), strict=True))
        for _ in range(2):
            line = f"{batch:3d} x {length:6d}"
            for name, loop in loops.items():
                ms = measure(*loop)
                line += f" | {name} {ms:.3f} {tera / ms:.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
