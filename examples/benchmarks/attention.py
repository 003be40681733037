"""Attention kernels on a Hopper GPU: errors against float32, and times against cuDNN and XLA.

    python examples/benchmarks/attention.py [check] [decode] [queries] [prefill] [--quick] [--head-dim 64]

Times are medians of the kernels of a call, ours and the peers' alike (CUPTI), over rotating buffers larger than the
L2 cache where the cache is smaller than that. They include every pass of the op: decode's
combination of splits, prefill's preparation of the cache. Prefill rates count 4 H operations for
each visible pair of query and key; decode rates count the bytes of codes and scales.
"""

import argparse
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from timing import alone, compile_all, device_time, require_hopper

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import attention_reference
from pallas_kernels.sm90.decode_attention import launch as decode
from pallas_kernels.sm90.decode_attention.config import Config as DecodeConfig
from pallas_kernels.sm90.prefill_attention import launch as prefill
from pallas_kernels.sm90.prefill_attention.config import Config as PrefillConfig
from pallas_kernels.sm90.prefill_attention.config import default_config
from pallas_kernels.sm90.prefill_attention.prepare import prepare

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
L2_BYTES = 60 << 20

DECODE_CONFIGS = (
    None,  # decode.default_config's
    DecodeConfig(),
    DecodeConfig(block_kv=128, warpgroups=2, residents=2),
    DecodeConfig(block_kv=128, warpgroups=1, residents=4),
)
PAGE = 256


class Timing(NamedTuple):
    """A call to be timed, in turn on each of its inputs."""

    run: Callable
    inputs: Callable[[], Sequence[tuple]]  # made when they are needed


def median_ms(timings: Sequence[Timing]) -> Iterator[float]:
    """Median time of a call's kernels, for each timing in turn; all are compiled before any runs."""
    programs = compile_all({i: (jax.jit(run), jax.eval_shape(inputs)[0]) for i, (run, inputs) in enumerate(timings)})
    for timing, program in zip(timings, programs.values(), strict=True):
        with alone():  # making them would disturb another's measurement
            inputs = jax.block_until_ready(timing.inputs())
        yield device_time(program, inputs) / 1e3


# --- errors ---------------------------------------------------------------------------------------


def check(slots: int, length: int, outliers: bool) -> str:
    """Errors of decode (``length`` 1) or prefill over ``slots`` keys, against float32 and the reference op's own."""
    keys = jax.random.split(jax.random.key(slots + length), 3)
    heads = 8 if length > 1 else HEADS
    kv_heads = heads // 4
    q = formats.quantize_fp8(random_rows(keys[0], (1, length, heads, HEAD_DIM), outliers))
    k, v = (formats.quantize_kv(random_rows(key, (1, kv_heads, slots, HEAD_DIM), outliers), "int4") for key in keys[1:])
    options: dict[str, Any] = {
        "query_start": jnp.array([slots - length]),
        "kv_lengths": jnp.array([slots]),
        # Outliers would leave one key all the weight.
        "scale": SCALE * (0.02 if outliers else 1.0),
    }
    run = decode.decode_attention if length == 1 else prefill.prefill_attention
    out = run(q, k, v, **options)
    with jax.default_matmul_precision("highest"):
        exact = attention_reference(
            ScaledArray(formats.dequantize(q), None, "none"), k, v, out_dtype=jnp.float32, **options
        )
        reference = attention_reference(q, k, v, **options)
    error, own = (
        float(jnp.linalg.norm(x.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) for x in (out, reference)
    )
    name = "decode" if length == 1 else f"prefill, {length} queries"
    rows = "outliers" if outliers else "Gaussian"
    return f"  {name:22s} {slots:6d} keys, {rows}: kernel {error:.4f}, reference {own:.4f}"


def random_rows(key: jax.Array, shape: tuple[int, ...], outliers: bool) -> jax.Array:
    """Gaussian; with outliers some channels are 20 times as large and tokens differ by powers of e."""
    x = jax.random.normal(key, shape)
    if outliers:
        channels, tokens = jax.random.split(jax.random.fold_in(key, 1))
        x *= 1 + 19 * jax.random.bernoulli(channels, 0.03, shape[-1:])
        x *= jnp.exp(jax.random.normal(tokens, (*shape[:-1], 1)))
    return x


def check_all() -> None:
    print("relative error against float32 attention over the same cache")
    cases = [(slots, length, outliers) for slots in (1024, 65536) for length in (1, 512) for outliers in (False, True)]
    # On threads, since most of the time is compilation; over memory full of NaN.
    jax.block_until_ready(jnp.full((1 << 28,), jnp.nan))
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for line in pool.map(lambda case: check(*case), cases):
            print(line, flush=True)


# --- times ----------------------------------------------------------------------------------------


def random_cache(seed: int, batch: int, slots: int, head_dim: int = HEAD_DIM) -> tuple[ScaledArray, ScaledArray]:
    """A random INT4 cache made without a float one."""
    shape = (batch, KV_HEADS, slots)

    @jax.jit
    def make(key):
        codes, scales = jax.random.split(key)
        scale = jnp.exp(0.2 * jax.random.normal(scales, (*shape, 1))) / formats.INT4_MAX
        values = jax.random.bits(codes, (*shape, head_dim // 2), jnp.uint8)
        return ScaledArray(values, scale.astype(jnp.bfloat16), "int4")

    keys = jax.random.split(jax.random.key(seed))
    return make(keys[0]), make(keys[1])


def time_decode(quick: bool) -> None:
    print("decode, one token: us and GB/s for each Config, then bf16 caches")
    shapes = [(batch, slots) for batch in (1, 16, 64) for slots in (1024, 2048, 4096, 16384, 65536)]
    if quick:
        shapes = [(1, 1024), (16, 1024), (1, 65536), (16, 4096), (64, 16384)]
    peers = ("cudnn",) if quick else ("cudnn", "xla")
    timings, of_shape = [], {}
    for batch, slots in shapes:
        size = batch * slots * 2 * KV_HEADS * (HEAD_DIM // 2 + 2)
        copies = max(1, min(8, -(-4 * L2_BYTES // size)))
        lengths = jnp.full((batch,), slots, jnp.int32)
        first = len(timings)
        for config in DECODE_CONFIGS:
            run = functools.partial(
                decode.decode_attention, query_start=lengths - 1, kv_lengths=lengths, scale=SCALE, config=config
            )
            inputs = functools.partial(quantized_operands, batch, 1, slots, copies)
            timings.append(Timing(run, inputs))
        if batch * slots <= 1 << 20:  # else the bf16 cache would not fit beside its copies
            copies = max(1, min(4, -(-4 * L2_BYTES // (4 * batch * slots * KV_HEADS * HEAD_DIM))))
            for name in peers:
                attend = functools.partial(jax.nn.dot_product_attention, implementation=name)
                inputs = functools.partial(bf16_operands, copies, batch, 1, slots)
                timings.append(Timing(attend, inputs))
        of_shape[batch, slots] = size, len(timings) - first
    times = median_ms(timings)
    for (batch, slots), (size, count) in of_shape.items():
        line = f"  {batch:3d} x {slots:6d}"
        for i, ms in enumerate(itertools.islice(times, count)):
            line += f" | {ms * 1e3:7.1f} us"
            line += f" {size / ms / 1e6:5.0f}" if i < len(DECODE_CONFIGS) else f" {peers[i - len(DECODE_CONFIGS)]}"
        print(line, flush=True)


def quantized_operands(batch: int, length: int, slots: int, copies: int, head_dim: int = HEAD_DIM) -> list[tuple]:
    """One batch of queries, and ``copies`` INT4 caches."""
    q = formats.quantize_fp8(jax.random.normal(jax.random.key(0), (batch, length, HEADS, head_dim)))
    return [(q, *random_cache(i, batch, slots, head_dim)) for i in range(copies)]


def time_few_queries() -> None:
    """Several queries a sequence, and the cache in pages, against one query over a cache in one piece."""
    print("decode of several tokens, and in pages of 256 slots in random order: us, and over one token's")
    shapes = (1, 16384), (16, 4096), (64, 4096)
    forms = (1, False), (1, True), (4, False), (8, False), (16, False), (16, True)
    timings = []
    for (batch, slots), (length, paged) in itertools.product(shapes, forms):
        lengths = jnp.full((batch,), slots, jnp.int32)
        pages = batch * slots // PAGE
        table = jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32).reshape(batch, -1)
        run = functools.partial(
            decode.decode_attention,
            query_start=lengths - length,
            kv_lengths=lengths,
            scale=SCALE,
            page_table=table if paged else None,
        )

        def inputs(batch: int = batch, length: int = length, slots: int = slots, paged: bool = paged) -> list[tuple]:
            [(q, *cache)] = quantized_operands(batch, length, slots, 1)
            return [(q, *(jax.tree.map(in_pages, cache) if paged else cache))]

        timings.append(Timing(run, inputs))
    times = median_ms(timings)
    for batch, slots in shapes:
        us = [ms * 1e3 for ms in itertools.islice(times, len(forms))]
        line = f"  {batch:3d} x {slots:6d}"
        for (length, paged), each in zip(forms, us, strict=True):
            line += f" | T {length:2d}{' paged' if paged else ''} {each:7.1f} us {each / us[0]:5.2f}"
        print(line, flush=True)


def in_pages(x: jax.Array) -> jax.Array:
    """[B, kv_heads, S, X] -> [pages, kv_heads, PAGE, X]."""
    batch, kv_heads, slots, columns = x.shape
    cut = x.reshape(batch, kv_heads, slots // PAGE, PAGE, columns).swapaxes(1, 2)
    return cut.reshape(-1, kv_heads, PAGE, columns)


def time_prefill(head_dim: int) -> None:
    default = default_config(head_dim)
    configs = (default,) if default.pipeline == 1 else (default, PrefillConfig(pipeline=1))
    print(
        f"prefill, causal, head_dim {head_dim}: ms and TFLOP/s of {configs}, of the first without preparation, of "
        "cuDNN in bf16 and in FP8"
    )
    shapes, scale = ((16, 1024), (4, 4096), (1, 16384), (1, 1024)), head_dim**-0.5
    timings = []
    for batch, length in shapes:
        start, lengths = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), length, jnp.int32)
        inputs = functools.partial(quantized_operands, batch, length, length, 1, head_dim)
        for config in configs:
            run = functools.partial(
                prefill.prefill_attention, query_start=start, kv_lengths=lengths, scale=scale, config=config
            )
            timings.append(Timing(run, inputs))

        def prepared(inputs: Callable = inputs, start: jax.Array = start, lengths: jax.Array = lengths) -> list[tuple]:
            [(q, key, value)] = inputs()
            assert q.scale is not None
            return [(q.values, q.scale[..., 0], *jax.jit(prepare)(key, value, lengths), start, lengths)]

        launch = functools.partial(
            prefill.launch, scale=scale, causal=True, window=None, out_dtype=jnp.bfloat16, config=default
        )
        timings.append(Timing(launch, prepared))
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        operands = functools.partial(bf16_operands, 1, batch, length, length, head_dim)
        timings.append(Timing(attend, operands))
        timings.append(Timing(functools.partial(cudnn_fp8, scale=scale), functools.partial(in_fp8, operands)))
    times = median_ms(timings)
    for batch, length in shapes:
        tera = 4e-9 * head_dim * HEADS * batch * length * (length + 1) / 2
        found = itertools.islice(times, len(configs) + 3)
        print(f"  {batch:3d} x {length:6d}" + "".join(f" | {ms:6.3f} {tera / ms:5.0f}" for ms in found), flush=True)


def bf16_operands(
    copies: int, batch: int, length: int, slots: int, head_dim: int = HEAD_DIM
) -> list[tuple[jax.Array, ...]]:
    """Random queries, keys and values [B, T, heads, H] as ``jax.nn.dot_product_attention`` takes them."""
    shapes = ((batch, length, HEADS), (batch, slots, KV_HEADS), (batch, slots, KV_HEADS))
    return [
        tuple(
            jax.random.normal(key, (*shape, head_dim), jnp.bfloat16)
            for key, shape in zip(jax.random.split(jax.random.key(seed), 3), shapes, strict=True)
        )
        for seed in range(copies)
    ]


def in_fp8(operands: Callable[[], Sequence[tuple[jax.Array, ...]]]) -> list[tuple[jax.Array, ...]]:
    """The operands in E4M3, with scales of 1."""
    return [tuple(x.astype(formats.E4M3) for x in each) for each in operands()]


def cudnn_fp8(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """cuDNN's causal FP8 attention, which JAX has no public name for."""
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    attend: Any = cudnn.dot_product_attention
    scales = dict.fromkeys(cudnn.fp8_params_keys, one)
    return attend(q, k, v, fp8_params=scales, scale=scale, mask_type=cudnn.MaskType.CAUSAL, use_fp8=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(MEASUREMENTS), metavar="|".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer decode shapes, cuDNN alone as baseline")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help="of prefill")
    arguments = parser.parse_args()
    require_hopper(parser)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for what in arguments.what:
        if what not in MEASUREMENTS:
            parser.error(f"unknown measurement {what!r}; expected some of {list(MEASUREMENTS)}")
        MEASUREMENTS[what](arguments)


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": lambda _: check_all(),
    "decode": lambda arguments: time_decode(arguments.quick),
    "queries": lambda _: time_few_queries(),
    "prefill": lambda arguments: time_prefill(arguments.head_dim),
}

if __name__ == "__main__":
    main()
