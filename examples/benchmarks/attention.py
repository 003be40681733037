"""Attention kernels on a Hopper GPU: errors against float32, and times against cuDNN and XLA.

    python examples/benchmarks/attention.py [check] [decode] [prefill] [--quick]

Every timing runs a loop inside one jit over rotating buffers larger than the L2 cache; the number
is the median of repetitions. Prefill rates count 4 H operations a visible (query, key) pair.
"""

import argparse
import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels import decode_attention_sm90 as decode
from pallas_kernels import prefill_attention_sm90 as prefill
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import attention_reference

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
L2_BYTES = 60 << 20


def median_ms(run: Callable, inputs: Sequence[tuple], iterations: int, repeats: int = 5) -> float:
    """Median time of one ``run``, called in turn on each of ``inputs`` inside one jitted loop."""

    @jax.jit
    def loop(inputs):
        def body(_, token):
            for args in inputs:
                # Ties every call to the last one's result, so that none is hoisted or merged.
                args, token = jax.lax.optimization_barrier((args, token))
                token = token + run(*args).reshape(-1)[0].astype(jnp.float32)
            return token

        return jax.lax.fori_loop(0, iterations, body, jnp.float32(0))

    loop(inputs).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        loop(inputs).block_until_ready()
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) * 1e3 / (iterations * len(inputs))


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_rows(key: jax.Array, shape: tuple[int, ...], outliers: bool) -> jax.Array:
    """Gaussian rows; with outliers some channels are 20 times as large and tokens differ by up to e^2."""
    x = jax.random.normal(key, shape)
    if outliers:
        channel = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.03, shape[-1:]) * 19.0 + 1.0
        token = jnp.exp(jax.random.normal(jax.random.fold_in(key, 2), (*shape[:-1], 1)))
        x = x * channel * token
    return x


def operands(
    seed: int, batch: int, length: int, heads: int, kv_heads: int, head_dim: int, slots: int, outliers: bool = False
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """FP8 queries and an INT4 cache."""
    keys = jax.random.split(jax.random.key(seed), 3)
    quantize_kv = jax.jit(lambda x: formats.quantize_kv(x, "int4"))
    q = jax.jit(formats.quantize_fp8)(random_rows(keys[0], (batch, length, heads, head_dim), outliers))
    k, v = (quantize_kv(random_rows(key, (batch, kv_heads, slots, head_dim), outliers)) for key in keys[1:])
    return q, k, v


def poison_tail(rows: ScaledArray, lengths: jax.Array) -> ScaledArray:
    """NaN scales in the slots that hold no token."""
    assert rows.scale is not None
    valid = (jnp.arange(rows.scale.shape[2]) < lengths[:, None])[:, None, :, None]
    return ScaledArray(rows.values, jnp.where(valid, rows.scale, jnp.nan))


@functools.partial(jax.jit, static_argnames=("scale", "causal", "window"))
def errors(out, q, k, v, start, lengths, scale, causal=True, window=None):
    """Relative errors against float32 attention over the same cache: the kernel's and the reference op's."""
    options = dict(query_start=start, kv_lengths=lengths, scale=scale, causal=causal, window=window)
    with jax.default_matmul_precision("highest"):
        exact = attention_reference(ScaledArray(formats.dequantize(q), None), k, v, out_dtype=jnp.float32, **options)
        reference = attention_reference(q, k, v, out_dtype=jnp.float32, **options)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3)))  # noqa: E731
    # The worst sequence counts.
    distance = [
        jnp.max(norm(x.astype(jnp.float32) - exact) / jnp.maximum(norm(exact), 1e-30)) for x in (out, reference)
    ]
    return *distance, jnp.max(jnp.abs(out.astype(jnp.float32) - reference)), jnp.max(jnp.abs(exact))


def report(name: str, out, q, k, v, start, lengths, scale, **options) -> bool:
    kernel, reference, largest, peak = (float(x) for x in errors(out, q, k, v, start, lengths, scale, **options))
    good = kernel < 1.25 * reference + 3e-3 and not np.isnan(kernel)
    print(
        f"{'ok  ' if good else 'FAIL'} {name}: kernel {kernel:.4f} reference {reference:.4f} max|d| {largest:.3g}/{peak:.3g}"
    )
    return good


def check_decode() -> None:
    cases = [
        # batch, T, heads, kv_heads, head_dim, slots, lengths, window, page_size, outliers, config
        (1, 1, 4, 1, 128, 128, [1], None, None, False, {}),
        (2, 1, 32, 8, 128, 512, [512, 127], None, None, False, {}),
        (4, 1, 32, 8, 128, 4096, [4096, 129, 1, 0], None, None, True, {}),
        (3, 4, 32, 8, 128, 1000, [1000, 128, 5], None, None, False, {}),
        (2, 16, 32, 8, 128, 1024, [1024, 600], None, None, False, {}),
        (2, 1, 8, 8, 64, 1024, [1024, 77], None, None, False, {}),
        (2, 2, 16, 2, 256, 1024, [1024, 300], None, None, True, {}),
        (2, 1, 32, 8, 128, 4096, [4096, 2000], 300, None, False, {}),
        (2, 5, 32, 8, 128, 4096, [4096, 200], 100, None, False, {}),
        (2, 1, 32, 8, 128, 4096, [4096, 257], None, 256, False, {}),
        (2, 1, 32, 8, 128, 4096, [4096, 257], None, None, False, dict(block_kv=128, stages=3, warpgroups=4)),
        (1, 1, 32, 8, 128, 65536, [65536], None, None, False, {}),
    ]

    def check(i: int) -> None:
        batch, length, heads, kv_heads, head_dim, slots, lengths, window, page, outliers, config = cases[i]
        q, k, v = operands(i, batch, length, heads, kv_heads, head_dim, slots, outliers)
        lengths = jnp.asarray(lengths, jnp.int32)
        start = jnp.maximum(lengths - length, 0)
        k, v = poison_tail(k, lengths), poison_tail(v, lengths)
        table, k_cache, v_cache = None, k, v
        if page is not None:
            table, k_cache, v_cache = to_pages(k, v, page)
        scale = head_dim**-0.5 * (0.02 if outliers else 1.0)
        options = dict(query_start=start, kv_lengths=lengths, scale=scale, window=window)
        out = decode.decode_attention_sm90(
            q, k_cache, v_cache, page_table=table, config=decode.Config(**config) if config else None, **options
        )
        name = f"decode {cases[i][:7]} window {window} page {page} {config}"
        report(name, out, q, k, v, start, lengths, scale, window=window)

    in_parallel(check, range(len(cases)))


def to_pages(k: ScaledArray, v: ScaledArray, page: int) -> tuple[jax.Array, ScaledArray, ScaledArray]:
    """The same cache in shuffled pages, with its table."""
    batch, kv_heads, slots = k.values.shape[:3]
    count = batch * slots // page
    order = jax.random.permutation(jax.random.key(7), count)

    def paged(x):
        x = x.reshape(batch, kv_heads, slots // page, page, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(count, kv_heads, page, x.shape[-1])[order]

    table = jnp.argsort(order).reshape(batch, slots // page).astype(jnp.int32)
    k, v = (ScaledArray(paged(x.values), paged(x.scale)) for x in (k, v))
    return table, k, v


def check_prefill(configs: Sequence[dict]) -> None:
    cases = [
        # batch, T, heads, kv_heads, head_dim, slots, start, lengths, causal, window, outliers
        (1, 128, 4, 1, 128, 128, [0], [128], True, None, False),
        (2, 512, 8, 2, 128, 512, [0, 0], [512, 511], True, None, False),
        (2, 300, 8, 2, 128, 1000, [700, 1], [1000, 129], True, None, True),
        (3, 256, 8, 2, 128, 640, [0, 0, 0], [640, 1, 0], False, None, False),
        (2, 512, 8, 2, 128, 1024, [512, 0], [1024, 500], True, 100, False),
        (1, 512, 8, 8, 64, 512, [0], [512], True, None, False),
        (1, 300, 4, 1, 256, 512, [200], [500], True, None, False),
    ]

    def check(case: tuple[int, int]) -> None:
        i, config = case[0], configs[case[1]]
        batch, length, heads, kv_heads, head_dim, slots, start, lengths, causal, window, outliers = cases[i]
        q, k, v = operands(100 + i, batch, length, heads, kv_heads, head_dim, slots, outliers)
        start, lengths = jnp.asarray(start, jnp.int32), jnp.asarray(lengths, jnp.int32)
        k, v = poison_tail(k, lengths), poison_tail(v, lengths)
        chosen = prefill.Config(**config) if head_dim == 128 else prefill.default_config(head_dim)
        scale = head_dim**-0.5 * (0.02 if outliers else 1.0)
        options = dict(causal=causal, window=window)
        out = prefill.prefill_attention_sm90(
            q, k, v, query_start=start, kv_lengths=lengths, scale=scale, config=chosen, **options
        )
        name = f"prefill {cases[i][:8]} {options} {config}"
        report(name, out, q, k, v, start, lengths, scale, **options)

    # Other head sizes have one configuration.
    work = [(i, c) for i in range(len(cases)) for c in range(len(configs)) if c == 0 or cases[i][4] == HEAD_DIM]
    in_parallel(check, work)


def in_parallel(check: Callable, cases: Sequence) -> None:
    """Run checks on threads, since most of their time is compilation."""
    jax.block_until_ready(jnp.full((1 << 30,), jnp.nan))  # what later outputs are allocated over
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for case, future in [(case, pool.submit(check, case)) for case in cases]:
            if error := future.exception():
                print(f"FAIL {case}: {type(error).__name__}: {str(error)[:300]}")


def full_cache(seed: int, batch: int, slots: int) -> tuple[ScaledArray, ScaledArray]:
    """A random INT4 cache made without a float one."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (batch, KV_HEADS, slots)

    @jax.jit
    def make(key, other):
        return ScaledArray(
            jax.random.bits(key, (*shape, HEAD_DIM // 2), jnp.uint8),
            jnp.exp(0.2 * jax.random.normal(other, (*shape, 1))).astype(jnp.bfloat16) / 7,
        )

    return make(keys[0], keys[1]), make(keys[2], keys[3])


def time_decode(quick: bool, configs: Sequence[dict]) -> None:
    print("decode, T = 1: us; GB/s of codes and scales; ratio to cuDNN and XLA bf16")
    shapes = [(1, 4096), (1, 16384), (1, 65536), (16, 4096), (16, 16384), (64, 4096), (64, 16384), (16, 65536)]
    if quick:
        shapes = [(1, 65536), (16, 4096), (64, 16384)]
    scale = HEAD_DIM**-0.5
    for batch, slots in shapes:
        row_bytes = 2 * KV_HEADS * (HEAD_DIM // 2 + 2)
        size = batch * slots * row_bytes
        copies = max(1, min(8, -(-4 * L2_BYTES // size)))
        lengths, start = jnp.full((batch,), slots, jnp.int32), jnp.full((batch,), slots - 1, jnp.int32)
        q, _, _ = operands(0, batch, 1, HEADS, KV_HEADS, HEAD_DIM, 8)
        inputs = [(q, *full_cache(i, batch, slots)) for i in range(copies)]
        iterations = max(2, int(2e-2 / max(5e-6, size / 3e12)) // copies)
        line = f"  {batch:3d} x {slots:6d}"
        for config in configs:
            run = functools.partial(
                decode.decode_attention_sm90, query_start=start, kv_lengths=lengths, scale=scale,
                config=decode.Config(**config),
            )  # fmt: skip
            ms = median_ms(lambda q, k, v, run=run: run(q, k, v), inputs, iterations)
            line += f" | {ms * 1e3:7.1f} us {size / ms / 1e6:5.0f} GB/s"
        del inputs
        if batch * slots <= 64 * 16384:
            q16 = jnp.ones((batch, 1, HEADS, HEAD_DIM), jnp.bfloat16)
            shape = (batch, slots, KV_HEADS, HEAD_DIM)
            make = jax.jit(lambda key, shape=shape: jax.random.normal(key, shape, jnp.bfloat16))
            copies = max(1, min(4, -(-4 * L2_BYTES // (batch * slots * 4096))))
            inputs = [(q16, make(jax.random.key(2 * i)), make(jax.random.key(2 * i + 1))) for i in range(copies)]
            for name in ("cudnn",) if quick else ("cudnn", "xla"):
                attend = functools.partial(jax.nn.dot_product_attention, implementation=name)
                try:
                    ms = median_ms(attend, inputs, max(2, iterations // 4), repeats=3)
                    line += f" | {name} {ms * 1e3:7.1f} us"
                except Exception as error:
                    line += f" | {name} failed: {str(error)[:60]!r}"
            del inputs
        print(line, flush=True)


def time_prefill(quick: bool, configs: Sequence[dict]) -> None:
    print("prefill, causal: ms and TFLOP/s")
    shapes = [(16, 1024), (4, 4096), (1, 16384)]
    for batch, length in shapes:
        start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
        operations = 4 * HEAD_DIM * HEADS * batch * length * (length + 1) / 2
        inputs = [operands(3, batch, length, HEADS, KV_HEADS, HEAD_DIM, length)]
        line = f"  {batch:3d} x {length:6d}"
        for config in configs:
            options = dict(query_start=start, kv_lengths=lengths, scale=HEAD_DIM**-0.5, config=prefill.Config(**config))
            try:
                ms = median_ms(functools.partial(prefill.prefill_attention_sm90, **options), inputs, 20, repeats=3)
                line += f" | {ms:6.3f} {operations / ms / 1e9:5.0f}"
            except Exception as error:
                line += f" | failed: {str(error)[:80]!r}"
        prepare = lambda q, k, v, lengths=lengths: prefill._prepare(  # noqa: E731
            q, k, v, lengths, HEAD_DIM**-0.5, prefill.Config()
        )
        preparation = jax.jit(prepare)
        jax.block_until_ready(preparation(*inputs[0]))
        begin = time.perf_counter()
        for _ in range(20):
            result = preparation(*inputs[0])
        jax.block_until_ready(result)
        line += f" | prepare {(time.perf_counter() - begin) / 20 * 1e3:.3f} ms"
        bf16 = [
            tuple(
                jax.random.normal(jax.random.key(i), (batch, length, heads, HEAD_DIM), jnp.bfloat16)
                for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
            )
        ]
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        ms = median_ms(attend, bf16, 20, repeats=3)
        print(line + f" | cudnn {ms:6.3f} {operations / ms / 1e9:5.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["check", "decode", "prefill"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    prefill_configs = [dict(), dict(stages=3), dict(pipeline=1)]
    decode_configs = [dict(), dict(block_kv=128, stages=3, warpgroups=4)]
    begin = time.perf_counter()
    for what in arguments.what:
        if what == "check":
            check_decode()
            check_prefill([{}] if arguments.quick else prefill_configs)
        elif what == "decode":
            time_decode(arguments.quick, decode_configs)
        elif what == "prefill":
            time_prefill(arguments.quick, prefill_configs)
        print(f"{what}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
