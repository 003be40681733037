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
TOKENS_PER_STORE = 64


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
        buffers: parts of 64 tokens of y, for each warpgroup, that may be on their way out.
        ahead: steps by which reading weights and building tables runs ahead of WGMMA.
        skew: nanoseconds by which the second warpgroup starts late, so that one writes its tile
            while the other has the tensor cores.
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
    buffers: int = 2
    ahead: int = 1
    skew: int = 0
    promote: int = 0

    def __post_init__(self) -> None:
        if self.tile_m % 8 or not 8 <= self.tile_m <= 256:
            raise ValueError(f"tile_m is {self.tile_m}; expected a multiple of 8 from 8 to 256")
        if self.tile_m > TOKENS_PER_STORE and self.tile_m % TOKENS_PER_STORE:
            raise ValueError(f"tile_m is {self.tile_m}; above {TOKENS_PER_STORE} it must be a multiple of it")
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
        if self.promote < 0 or (self.promote and self.tile_m > 128):
            raise ValueError(f"{self}: promotion needs a second sum in registers; tile_m may be at most 128")

    @property
    def tile_n(self) -> int:
        """Output channels of a CTA's tile."""
        return layouts.TILE_N * self.warpgroups


def smem_bytes(config: Config, values: Values, groups: int = 1, scale_bytes: int = 1) -> int:
    """Shared memory that a CTA needs, with what the allocator may add.

    Args:
        config: the configuration.
        values: type of x.
        groups: groups in 128 inputs (1 or 2).
        scale_bytes: bytes of a group scale.
    """
    x_row = layouts.TILE_K * (1 if values == "e4m3" else 2)
    tile = config.tile_m * x_row + config.tile_n * (layouts.TILE_K // 2 + groups * scale_bytes)
    store = config.buffers * min(config.tile_m, TOKENS_PER_STORE) * layouts.TILE_N * 2
    tokens = 1024 if config.tile_m > 128 else 512
    return config.stages * config.k_tiles * tile + config.warpgroups * (store + tokens) + 4096


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
    if values == "e4m3" and scale_in_table and groups == 1:
        by_tokens = _tuned(_device_kind()).get(f"{n}x{k}", {})
        buckets = sorted(bucket for bucket in by_tokens if bucket >= m)
        if buckets:
            return by_tokens[buckets[0]]
    return heuristic(m, n, k, values, scale_in_table, groups)


def heuristic(m: int, n: int, k: int, values: Values, scale_in_table: bool, groups: int) -> Config:
    """A sound configuration for a shape that nobody has tuned."""
    if m > 64:
        # A second sum in registers, or two-byte operands, halve the tile.
        halvings = (not scale_in_table) + (not scale_in_table and (groups == 2 or values == "bf16"))
        tile_m = min(256, 128 if m <= 128 else 256) >> halvings if values == "e4m3" else 128 >> halvings
        config = Config(tile_m=tile_m, stages=4, multicast=2)
        return dataclasses.replace(config, stages=_stages(config, values, groups))
    tile_m = next(size for size in (8, 16, 32, 64) if m <= size)
    k_tiles = 2 if tile_m <= 32 and values == "e4m3" and scale_in_table else 1
    tiles = -(-n // (2 * layouts.TILE_N))
    # Enough CTAs for every SM to have two: one streams while the other starts or ends.
    split_k = max(1, min(8, 2 * NUM_SMS // tiles, k // (layouts.TILE_K * k_tiles * 4)))
    config = Config(tile_m=tile_m, k_tiles=k_tiles, split_k=split_k, stages=max(4, -(-tile_m * 7 // 16)))
    return dataclasses.replace(config, stages=min(config.stages, _stages(config, values, groups)))


def _stages(config: Config, values: Values, groups: int) -> int:
    """The most stages that fit into shared memory, with scales of two bytes."""
    stages = 2
    while stages < 8 and smem_bytes(dataclasses.replace(config, stages=stages + 1), values, groups, 2) <= SMEM_BYTES:
        stages += 1
    return stages


def _device_kind() -> str:
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else ""


@functools.cache
def _tuned(device_kind: str) -> dict[str, dict[int, Config]]:
    """Tuned configurations of a device kind: {"NxK": {largest number of tokens: Config}}."""
    name = device_kind.lower().replace(" ", "_") + ".json"
    file = importlib.resources.files("pallas_kernels") / "tuned" / name
    if not device_kind or not file.is_file():
        return {}
    shapes: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["matmul"]
    return {shape: {int(m): Config(**c) for m, c in by_tokens.items()} for shape, by_tokens in shapes.items()}
