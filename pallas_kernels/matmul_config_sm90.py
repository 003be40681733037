"""How the Hopper matmul cuts its work: configurations, tuned for shapes that were measured, sound for the rest."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal

import jax

from pallas_kernels import layouts

Values = Literal["e4m3", "bf16"]
NUM_SMS = 132
SMEM_BYTES = 227 * 1024
STORE_BUFFERS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        tile_m: tokens of a tile (WGMMA's N).
        warpgroups: computing warpgroups of a CTA; a tile has 64 output channels for each.
        stages: steps that the ring holds.
        k_tiles: a step is 128 inputs times this. One: the next step's weights are dequantized
            while the tensor cores have this one's. More: few waits, for when they have little to do.
        multicast: CTAs (1 or 2) that share the tokens of a tile and load them once for both.
        split_k: CTAs of a cluster that share a tile, each with a part of K; the first adds up.
        band: tiles of tokens that are visited before the next output channels; bounds the part of
            x that must stay in the L2 cache.
        store_m: tokens of y that a warpgroup writes at a time; its buffers take room from the ring.
        promote: steps after which the tensor cores' sum moves into a float32 sum (their own
            accumulator has fewer bits); 0: never.
    """

    tile_m: int
    warpgroups: int = 2
    stages: int = 4
    k_tiles: int = 1
    multicast: int = 1
    split_k: int = 1
    band: int = 16
    store_m: int = 64
    promote: int = 0

    def __post_init__(self) -> None:
        if self.tile_m % 8 or not 8 <= self.tile_m <= 256:
            raise ValueError(f"tile_m is {self.tile_m}; expected a multiple of 8 from 8 to 256")
        if self.store_m % 8 or not 8 <= self.store_m <= 64:
            raise ValueError(f"store_m is {self.store_m}; expected a multiple of 8 from 8 to 64")
        if self.tile_m > self.store_m and self.tile_m % self.store_m:
            raise ValueError(f"tile_m is {self.tile_m}; expected a multiple of store_m, {self.store_m}")
        if self.warpgroups not in (2, 4):
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 2 or 4")
        if self.warpgroups == 4 and self.tile_m > 64:
            raise ValueError(f"tile_m is {self.tile_m}; four warpgroups have registers for at most 64")
        if not 2 <= self.stages <= 32:
            raise ValueError(f"stages is {self.stages}; expected 2 to 32")
        if self.multicast not in (1, 2) or not 1 <= self.split_k <= 8:
            raise ValueError(f"multicast is {self.multicast} and split_k {self.split_k}; expected 1..2 and 1..8")
        if self.multicast > 1 and self.split_k > 1:
            raise ValueError("multicast and split_k exclude each other")
        if self.k_tiles not in (1, 2, 4) or (self.k_tiles > 1 and self.promote):
            raise ValueError(f"k_tiles is {self.k_tiles}; expected 1, 2 or 4, and 1 with promotion")
        if (self.split_k - 1) * self.tile_m > 16 * self.stages * self.k_tiles:
            raise ValueError(f"{self}: the partial sums do not fit into the ring")
        if self.promote < 0 or (self.promote and self.tile_m > 192):
            raise ValueError(f"{self}: promotion needs a second sum in registers; tile_m may be at most 192")

    @property
    def tile_n(self) -> int:
        """Output channels of a CTA's tile."""
        return layouts.TILE_N * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and types of one call, all static.

    Attributes:
        m: tokens.
        n: output channels, a multiple of 64.
        k: inputs, a multiple of 128.
        n_out: columns of y.
        groups: groups in 128 inputs (1 or 2).
        values: type of x.
        scale_in_table: group scales are E4M3 and part of the dequantized weights; else they are
            bf16 and multiply each group's float32 sum.
        silu_mul: gate and up channels alternate in blocks of 8; y is SiLU(gate) * up.
    """

    m: int
    n: int
    k: int
    n_out: int
    groups: int
    values: Values
    scale_in_table: bool
    silu_mul: bool

    @property
    def halves(self) -> int:
        """WGMMA calls for a tile: 2 if its rows of x are 256 bytes or it has two scales outside the table."""
        return 2 if self.values == "bf16" or (self.groups == 2 and not self.scale_in_table) else 1

    def scales_in_ring(self, config: Config) -> bool:
        """Whether group scales come with the weights through TMA; else they are read far ahead."""
        return config.k_tiles > 1 or not self.scale_in_table

    @property
    def rows_out(self) -> int:
        """Columns of y that a warpgroup's 64 channels become."""
        return layouts.TILE_N // 2 if self.silu_mul else layouts.TILE_N


def smem_bytes(config: Config, values: Values) -> int:
    """Shared memory that a CTA needs for x in ``values``, with what the allocator may add."""
    x_row = layouts.TILE_K * (1 if values == "e4m3" else 2)
    # At most four bytes of scales for each 128 inputs of a channel.
    tile = config.tile_m * x_row + config.tile_n * (layouts.TILE_K // 2 + 4)
    store = STORE_BUFFERS * min(config.store_m, config.tile_m) * layouts.TILE_N * 2
    tokens = 1024 if config.tile_m > 128 else 512
    return config.stages * config.k_tiles * tile + config.warpgroups * (store + tokens) + 2048


def choose(m: int, n: int, k: int, values: Values, scale_in_table: bool, groups: int) -> Config:
    """The configuration for a problem: tuned if its weight's shape was, else by rule.

    Args:
        m: tokens.
        n: output channels.
        k: inputs, a multiple of 128.
        values: type of x.
        scale_in_table: whether group scales are E4M3 (else each group has its own float32 sum).
        groups: groups in 128 inputs (1 or 2).
    """
    # Between 65 and 128 tokens the tile is half that of the next bucket.
    if values == "e4m3" and scale_in_table and groups == 1 and not 64 < m <= 128:
        by_tokens = _tuned(_device_kind()).get(f"{n}x{k}", {})
        # The largest bucket serves every larger number of tokens.
        buckets = [bucket for bucket in by_tokens if bucket >= m] or list(by_tokens)[-1:]
        if buckets and (m <= 64) == (buckets[0] <= 64):
            return by_tokens[buckets[0]]
    return heuristic(m, n, k, values, scale_in_table, groups)


def heuristic(m: int, n: int, k: int, values: Values, scale_in_table: bool, groups: int) -> Config:
    """A sound configuration for a shape that nobody has tuned."""
    if m > 64:
        tile_m = 128 if m <= 128 or values == "bf16" else 256
        if not scale_in_table:
            # A second sum takes as many registers as the first, and wider weights or two scales more.
            tile_m = 64 if values == "bf16" or groups == 2 else 128
        return _with_stages(Config(tile_m, multicast=2), values, 8)
    tile_m = next(size for size in (8, 16, 32, 64) if m <= size)
    if scale_in_table and values == "e4m3" and n > NUM_SMS * 2 * layouts.TILE_N:
        # Every SM has a tile without splitting K: make it a large one.
        return Config(tile_m, warpgroups=4, k_tiles=2, stages=3, store_m=min(tile_m, 16))
    k_tiles = (4 if tile_m <= 16 and values == "e4m3" else 2) if scale_in_table else 1
    config = _with_stages(Config(tile_m, k_tiles=k_tiles, store_m=min(tile_m, 16)), values, 8 // k_tiles)
    return dataclasses.replace(config, split_k=most_splits(config, n, k, values))


def most_splits(config: Config, n: int, k: int, values: Values) -> int:
    """The most parts of K for few tokens: as many CTAs as run at once, two steps each, sums that fit the ring."""
    ctas = -(-n // config.tile_n)
    # With more tokens, or four warpgroups, the registers are for one CTA an SM.
    two = config.warpgroups == 2 and config.tile_m <= 16 and 2 * smem_bytes(config, values) <= SMEM_BYTES
    return max(
        1,
        min(
            8,
            (2 if two else 1) * NUM_SMS // ctas,
            k // (layouts.TILE_K * config.k_tiles * 2),
            1 + 16 * config.stages * config.k_tiles // config.tile_m,
        ),
    )


def _with_stages(config: Config, values: Values, most: int) -> Config:
    stages = 2
    while stages < most and smem_bytes(dataclasses.replace(config, stages=stages + 1), values) <= SMEM_BYTES:
        stages += 1
    return dataclasses.replace(config, stages=stages)


def _device_kind() -> str:
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else ""


@functools.cache
def _tuned(device_kind: str) -> dict[str, dict[int, Config]]:
    """Tuned configurations of a device kind: {"NxK": {number of tokens up to which it is used: Config}}."""
    name = device_kind.lower().replace(" ", "_") + ".json"
    file = importlib.resources.files("pallas_kernels") / "tuned" / name
    if not device_kind or not file.is_file():
        return {}
    shapes: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["matmul"]
    return {
        shape: {int(m): Config(**by_tokens[m]) for m in sorted(by_tokens, key=int)}
        for shape, by_tokens in shapes.items()
    }
