"""Find the Hopper matmul's configurations for a list of weight shapes and write pallas_kernels/tuned/.

    PYTHONPATH=. python examples/benchmarks/tune_matmul.py --shapes 28672x4096 4096x14336 --tokens 16 4096

Each bucket of tokens gets the fastest of about ten candidates, whose results must be the
reference's; up to 512 tokens the norm that follows counts, because it reduces split-K partials.
From 65 to 512 tokens the heuristic decides, which was fitted to such times: they are printed, not written.
Existing entries of other shapes and buckets are kept.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from timing import compile_all, device_time, require_hopper

from pallas_kernels import formats, layouts
from pallas_kernels.matmul import matmul_reference
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.common.hardware import NUM_SMS, SMEM_BYTES
from pallas_kernels.sm90.matmul import launch
from pallas_kernels.sm90.matmul.config import (
    MAX_DECODE_M,
    MAX_HEURISTIC_M,
    Config,
    DecodeConfig,
    deepest,
    fill,
    smem_bytes,
    to_json,
)
from pallas_kernels.sm90.row_quantize import launch as row_quantize
from pallas_kernels.split_k import SplitKPartials

TUNED = Path(__file__).parents[2] / "pallas_kernels" / "tuned"
LLAMA = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "22016x4096", "4096x11008", "57344x8192", "8192x28672")


def _matmul(
    x: formats.ScaledArray, weight: QuantizedTensor, residual: jax.Array, *, n: int, config: Config | DecodeConfig
) -> tuple[jax.Array, formats.ScaledArray | None]:
    """The matmul; up to 512 tokens with the norm that reads it and adds up what it leaves in parts."""
    assert x.scale is not None
    assert weight.group_scale is not None
    y = launch.matmul(
        x.values,
        weight.values,
        weight.group_scale,
        weight.channel_scale,
        n=n,
        config=config,
        x_scale=x.scale.reshape(-1),
        residual=residual,
    )
    gain = jnp.ones((n,), jnp.float32)
    if isinstance(y, SplitKPartials):
        rows, y = row_quantize.sum_norm_quantize(y, gain, eps=1e-5)
        return y, rows
    return y, row_quantize.rms_norm_quantize(y, gain, eps=1e-5) if x.values.shape[0] <= MAX_HEURISTIC_M else None


def candidates(m: int, n: int, k: int) -> Iterator[Config | DecodeConfig]:
    """Configurations worth timing."""
    if MAX_DECODE_M < m <= MAX_HEURISTIC_M:
        for tile_m in (64, 128, 192, 256):
            tiles = pl.cdiv(m, tile_m) * pl.cdiv(n, 2 * layouts.TILE_N)
            most = max(1, min(8, NUM_SMS // tiles))
            for split_k in sorted({1, most, pl.cdiv(most, 2)} if tile_m < 2 * m else ()):
                for multicast in (1, 2) if tile_m <= 128 else (2,):
                    config = Config(tile_m, split_k=split_k, multicast=multicast)
                    yield deepest(config, k, "e4m3")
        return
    if m > MAX_DECODE_M:
        for band in (8, 16):
            yield Config(256, multicast=2, band=band)
        yield Config(256, stages=5, multicast=2, store_m=32)
        yield Config(256)
        yield Config(208, stages=5, multicast=2, store_m=16)
        yield Config(192, stages=5, multicast=2)
        return
    for k_tiles, stages in ((4, 2), (2, 3)):
        yield Config(m, warpgroups=4, k_tiles=k_tiles, stages=stages, store_m=min(m, 16))
    for warpgroups, k_warpgroups in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 6), (8, 8)):
        config = DecodeConfig(m, warpgroups, k_warpgroups)
        ctas = pl.cdiv(n, config.columns * layouts.TILE_N)
        ctas_per_sm = 2 if warpgroups == 2 else 1
        splits = {max(1, min(8, ctas_per_sm * NUM_SMS // ctas))} | ({1} if ctas >= NUM_SMS // 2 else set())
        for split_k in splits:
            yield fill(dataclasses.replace(config, split_k=split_k), k, "e4m3", ctas_per_sm)


def tune(m: int, n: int, k: int) -> Config | DecodeConfig:
    """The fastest candidate for a shape, measured over rotating weights."""
    copies = max(2, min(24, 400_000_000 // (n * k // 2)))
    keys = jax.random.split(jax.random.key(0), copies + 1)
    weights = [QuantizedTensor.random(key, (n, k)) for key in keys[1:]]
    x = formats.quantize_fp8(jax.random.normal(keys[0], (m, k)))
    residual = jax.random.normal(keys[0], (m, n)).astype(jnp.bfloat16)
    expected = jax.jit(matmul_reference)(x, weights[0], residual=residual).astype(jnp.float32)
    usable = [config for config in candidates(m, n, k) if smem_bytes(config, k, "e4m3") <= SMEM_BYTES]

    arguments = [(x, weight, residual) for weight in weights]
    programs = compile_all(
        {config: (jax.jit(functools.partial(_matmul, n=n, config=config)), arguments[0]) for config in usable}
    )
    for config, program in programs.items():
        y = program(*arguments[0])[0].astype(jnp.float32)
        difference = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
        if not difference < 5e-3:  # Both are rounded to bf16, and sum in different orders.
            raise RuntimeError(f"{n}x{k}, {m} tokens: {config} differs from the reference by {difference:.1e}")
    # Kernels under some tens of microseconds vary from burst to burst: the better of two counts.
    rounds, burst_us = (2, 2000) if m <= MAX_HEURISTIC_M else (1, 8000)
    times = {
        config: min(device_time(program, arguments, burst_us) for _ in range(rounds))
        for config, program in programs.items()
    }
    best = sorted(times, key=lambda config: times[config])
    for config in best:
        print(f"{n}x{k} M={m}: {times[config]:8.2f} us {to_json(config)}", flush=True)
    return best[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=LLAMA, help="N x K of the weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 16, 32, 64, 1024, 4096])
    parser.add_argument("--output", type=Path, default=TUNED)
    args = parser.parse_args()
    require_hopper(parser)
    file = args.output / (jax.devices()[0].device_kind.lower().replace(" ", "_") + ".json")
    table: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"matmul": {}}
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        entry = table["matmul"].setdefault(shape, {})
        for m in args.tokens:
            best = tune(m, n, k)
            if not MAX_DECODE_M < m <= MAX_HEURISTIC_M:
                entry[str(m)] = to_json(best)
        # The largest bucket serves every larger number of tokens.
        table["matmul"][shape] = dict(sorted(entry.items(), key=lambda item: int(item[0])))
        file.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
