"""Configurations of the Hopper matmul: tuned for shapes that were measured, by a heuristic for the rest."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import dispatch, formats, layouts
from pallas_kernels.matmul_epilogue import Activation, width_out
from pallas_kernels.sm90.common.hardware import NUM_SMS, SMEM_BYTES
from pallas_kernels.split_k import MAX_PARTS

Values = Literal["e4m3", "bf16"]
STORE_BUFFERS = 2  # of y in shared memory: one is filled while TMA reads the other
# Largest M (tokens) for the decode kernel.
MAX_DECODE_M = 64
# Largest M for the heuristic where the shape has been tuned. Above MAX_DECODE_M it finds what tuning found, and
# finds it for each M, where tuned configurations serve buckets of M.
MAX_HEURISTIC_M = 512
# The decode kernel copies x in chunks of so many tiles of 128 inputs, and waits once for each.
CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Of the warp-specialized kernel, for many tokens, or for weights of so many rows that every SM has some.

    Attributes:
        tile_m: tokens of a tile (WGMMA's N).
        warpgroups: consumers of a CTA; a tile has 64 output channels for each.
        split_k: parts that K is cut into, where there are fewer tiles than SMs. Above one, each part's sums go to
            GMEM, for the next kernel to reduce (``SplitKPartials``).
        stages: of the pipeline from the producer to the consumers; a stage holds a step's operands.
        k_tiles: a step is 128 inputs times this. One: the next step's weights are dequantized while the tensor cores
            multiply this one's. More: fewer waits, for few tokens, where WGMMAs take little time.
        multicast: CTAs (1 or 2) of a cluster that share the tokens of a tile and load them once for both.
        band: tiles of tokens that are visited before the next output channels; bounds the part of x that must stay
            in the L2 cache.
        store_m: tokens of y that a warpgroup stores at a time; larger buffers leave room for fewer stages.
        promote: steps after which WGMMA's sum is added to a float32 sum (its own accumulator has fewer bits);
            0: never.

    Raises:
        ValueError: for numbers that the kernel cannot run with.
    """

    tile_m: int
    warpgroups: int = 2
    split_k: int = 1
    stages: int = 4
    k_tiles: int = 1
    multicast: int = 1
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
        _check_split(self.split_k)
        if not 2 <= self.stages <= 32:
            raise ValueError(f"stages is {self.stages}; expected 2 to 32")
        if self.multicast not in (1, 2):
            raise ValueError(f"multicast is {self.multicast}; expected 1 or 2")
        if self.k_tiles not in (1, 2, 4) or (self.k_tiles > 1 and self.promote):
            raise ValueError(f"k_tiles is {self.k_tiles}; expected 1, 2 or 4, and 1 with promotion")
        if self.promote < 0 or (self.promote and self.tile_m > 144):
            raise ValueError(f"{self}: promotion needs a second sum in registers; tile_m may be at most 144")

    @property
    def tile_n(self) -> int:
        """Output channels of a CTA's tile."""
        return layouts.TILE_N * self.warpgroups

    def steps(self, k: int) -> int:
        """Steps over a tile's part of K; the last may go past the end of K."""
        return pl.cdiv(k // layouts.TILE_K, self.k_tiles * self.split_k)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Of the decode kernel, for few tokens and weights of few rows.

    Attributes:
        tile_m: tokens of a tile.
        warpgroups: of a CTA.
        k_warpgroups: warpgroups that share 64 output channels, each with a part of K.
        split_k: CTAs that share output channels, each with a part of K. Above one, their sums go to GMEM, for the
            next kernel to reduce (``SplitKPartials``).
        depth: packed tiles (4 KB) that a warpgroup has in flight.
        stages: chunks of ``CHUNK`` tiles of x that shared memory holds.

    Raises:
        ValueError: for numbers that the kernel cannot run with.
    """

    tile_m: int
    warpgroups: int = 4
    k_warpgroups: int = 1
    split_k: int = 1
    depth: int = 8
    stages: int = 2

    def __post_init__(self) -> None:
        if self.tile_m % 8 or not 8 <= self.tile_m <= MAX_DECODE_M:
            raise ValueError(f"tile_m is {self.tile_m}; expected a multiple of 8 from 8 to {MAX_DECODE_M}")
        if not 1 <= self.warpgroups <= 8 or self.k_warpgroups < 1 or self.warpgroups % self.k_warpgroups:
            raise ValueError(f"{self}: expected 1 to 8 warpgroups, a multiple of k_warpgroups")
        _check_split(self.split_k)
        if not 2 <= self.stages <= 32 or self.depth < 1:
            raise ValueError(f"{self}: expected 2 to 32 stages and a depth of at least 1")

    @property
    def columns(self) -> int:
        """Groups of 64 output channels that a CTA computes."""
        return self.warpgroups // self.k_warpgroups

    def k_tiles(self, k: int) -> int:
        """Tiles of 128 inputs of each warpgroup; the last parts of K may have fewer."""
        return pl.cdiv(k // layouts.TILE_K, self.split_k * self.k_warpgroups)


def _check_split(split_k: int) -> None:
    if not 1 <= split_k <= MAX_PARTS:
        raise ValueError(f"split_k is {split_k}; expected 1 to {MAX_PARTS}")


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
        activation: of the gate, where there is one; gate and up channels alternate in blocks of 8.
        codebook: what the weight's codes stand for.
    """

    m: int
    n: int
    k: int
    n_out: int
    groups: int
    values: Values
    scale_in_table: bool
    activation: Activation
    codebook: formats.Codebook = "int4"

    @property
    def halves(self) -> int:
        """WGMMA calls for a tile of K: 2 if its rows of x are 256 bytes, or if it has two scales outside the table."""
        return 2 if self.values == "bf16" or (self.groups == 2 and not self.scale_in_table) else 1

    @property
    def scale_dtype(self) -> Any:
        """Of group scales, as the kernels see them."""
        return jnp.uint8 if self.scale_in_table else jnp.bfloat16

    @property
    def rows_out(self) -> int:
        """Columns of y that a warpgroup's 64 channels become."""
        return width_out(layouts.TILE_N, self.activation)

    def result(self, split_k: int) -> jax.ShapeDtypeStruct:
        """What a kernel writes: y, or with split K the unscaled partial sums [split_k, M, N], float32."""
        if split_k == 1:
            return jax.ShapeDtypeStruct((self.m, self.n_out), jnp.bfloat16)
        return jax.ShapeDtypeStruct((split_k, self.m, self.n), jnp.float32)


class Operands(NamedTuple):
    """One call's arrays in GMEM, as the kernels see them."""

    x: Any  # [M, K / columns, columns]; columns are one swizzled row of SMEM
    words: Any  # int32 [N / 64, K / 128, 4, 256]
    group_scale: Any  # uint8 (the bits of E4M3) or bf16 [G, N]
    channel_scale: Any | None = None  # float32 [N]; like all that follows, None with split K
    x_scale: Any | None = None  # float32 [M]
    bias: Any | None = None  # [N or less]
    residual: Any | None = None  # bf16 [M, n_out]
    y: Any | None = None  # bf16 [M, n_out], or with split K float32 [split_k, M, N]


def smem_bytes(config: Config | DecodeConfig, k: int, values: Values) -> int:
    """Shared memory of a CTA for k inputs of x in ``values``; an upper bound, alignment included."""
    # Scales take at most four bytes for each 128 inputs of a channel.
    x_tile = config.tile_m * layouts.TILE_K * (1 if values == "e4m3" else 2)
    if isinstance(config, DecodeConfig):
        store = config.columns * _store_bytes(16, config.tile_m) if config.split_k == 1 else 0
        weights = config.warpgroups * word_slots(config, k) * 4096
        chunk = CHUNK * (x_tile + config.columns * layouts.TILE_N * 4)
        return weights + config.k_warpgroups * decode_stages(config, k) * chunk + store + 2048
    tile = x_tile + config.tile_n * (layouts.TILE_K // 2 + 4)
    store = config.warpgroups * _store_bytes(config.store_m, config.tile_m) if config.split_k == 1 else 0
    return config.stages * config.k_tiles * tile + store + 2048


def _store_bytes(store_m: int, tile_m: int) -> int:
    return STORE_BUFFERS * min(store_m, tile_m) * layouts.TILE_N * 2 + (1024 if tile_m > 128 else 512)


def decode_stages(config: DecodeConfig, k: int) -> int:
    """Chunks of x that shared memory holds: no more than there are."""
    return min(config.stages, pl.cdiv(config.k_tiles(k), CHUNK))


def word_slots(config: DecodeConfig, k: int) -> int:
    """Packed tiles that a warpgroup has room for: ``depth``, or what its sum takes, where others add that to theirs."""
    return max(min(config.depth, config.k_tiles(k)), pl.cdiv(config.tile_m, 16) if config.k_warpgroups > 1 else 1)


def choose(
    m: int, n: int, k: int, values: Values, scale_in_table: bool, groups: int, *, may_split: bool = False
) -> Config | DecodeConfig:
    """The configuration for a problem: tuned if its weight's shape was, else the heuristic's.

    Args:
        m: tokens.
        n: output channels.
        k: inputs, a multiple of 128.
        values: type of x.
        scale_in_table: whether group scales are E4M3 (else each group has its own float32 sum).
        groups: groups in 128 inputs (1 or 2).
        may_split: whether the kernels that read y can reduce partial sums. The decode kernel splits K either way.
    """
    if values == "e4m3" and scale_in_table and groups == 1 and not MAX_DECODE_M < m <= MAX_HEURISTIC_M:
        by_tokens = _tuned(_device_kind()).get(f"{n}x{k}", {})
        # A bucket serves all M up to its own, the largest bucket every larger M.
        buckets = [bucket for bucket in by_tokens if bucket >= m] or list(by_tokens)[-1:]
        if buckets and (m <= MAX_DECODE_M) == (buckets[0] <= MAX_DECODE_M):
            return by_tokens[buckets[0]]
    return heuristic(m, n, k, values, scale_in_table, groups, may_split=may_split)


def heuristic(
    m: int, n: int, k: int, values: Values, scale_in_table: bool, groups: int, *, may_split: bool = False
) -> Config | DecodeConfig:
    """A sound configuration for a shape that nobody has tuned; arguments as those of ``choose``."""
    if m <= MAX_DECODE_M:
        return _decode_heuristic(8 * pl.cdiv(m, 8), n, k, values, scale_in_table)
    # Promotion's second sum takes as many registers as the first; wider weights or two scales take more.
    most = 256 // ((1 if scale_in_table else 2 * groups) * (1 if values == "e4m3" else 2))
    sizes = [size for size in (64, 128, 192, 208, 224, 240, 256) if size <= max(64, most)]
    parts = range(1, MAX_PARTS + 1) if may_split else (1,)
    tile_m, split_k = min(itertools.product(sizes, parts), key=lambda cut: _estimated_us(m, n, k, *cut))
    store_m = next(size for size in range(64, 0, -8) if tile_m % size == 0)
    # Sharing x spares the L2 cache, which limits where many tokens keep all SMs reading from it.
    multicast = 1 if tile_m <= 128 and m <= MAX_HEURISTIC_M else 2
    return deepest(Config(tile_m, split_k=split_k, multicast=multicast, store_m=store_m), k, values)


def _estimated_us(m: int, n: int, k: int, tile_m: int, split_k: int) -> float:
    """Microseconds on an H200 of the warp-specialized kernel and of reducing its partial sums, for comparisons.

    A wave of tiles costs 2 us and so much a step; a partial sum 0.3 us a MB, written and read. The numbers are a fit
    to (4096, 4096), (6144, 4096) and (4096, 14336) at 128, 256 and 512 tokens.
    """
    config = Config(tile_m, split_k=split_k, store_m=8)
    tiles = pl.cdiv(m, tile_m) * pl.cdiv(n, config.tile_n) * split_k
    wave = 2 + config.steps(k) * (0.215 + 0.0014 * tile_m)
    return pl.cdiv(tiles, NUM_SMS) * wave + (0.3e-6 * 4 * split_k * m * n if split_k > 1 else 0)


def deepest(config: Config, k: int, values: Values) -> Config:
    """``config`` with as many stages as fit into an SM, up to eight."""
    return _largest(config, "stages", 8, k, values)


def _decode_heuristic(tile_m: int, n: int, k: int, values: Values, scale_in_table: bool) -> Config | DecodeConfig:
    """``heuristic`` for up to ``MAX_DECODE_M`` tokens, of which ``tile_m`` are a multiple of 8."""
    tiles_n = pl.cdiv(n, layouts.TILE_N)
    if tiles_n > 2 * NUM_SMS and values == "e4m3" and scale_in_table:
        # Rows for four warpgroups on every SM, or nearly: nothing needs K to be split.
        return Config(tile_m, warpgroups=4, k_tiles=2, stages=3, store_m=16 if tile_m % 16 == 0 else 8)
    # Two CTAs an SM; with more tokens one, whose warpgroups share x in shared memory.
    warpgroups, ctas_per_sm = (2, 2) if tile_m <= 32 else (4, 1)
    k_warpgroups = 2 if tiles_n <= NUM_SMS and (values == "e4m3" or tile_m <= 32) else 1
    ctas = pl.cdiv(tiles_n * k_warpgroups, warpgroups)
    # As many parts of K as fill the SMs, each of a chunk at least.
    split_k = max(1, min(MAX_PARTS, ctas_per_sm * NUM_SMS // ctas, k // (layouts.TILE_K * k_warpgroups * CHUNK)))
    return fill(DecodeConfig(tile_m, warpgroups, k_warpgroups, split_k), k, values, ctas_per_sm)


def fill(config: DecodeConfig, k: int, values: Values, ctas_per_sm: int) -> DecodeConfig:
    """``config`` with as many loads in flight as help, so that ``ctas_per_sm`` CTAs fit into an SM, or at least one.

    Depth and stages grow in turns, for neither helps without the other.
    """
    config = dataclasses.replace(config, depth=1, stages=2)
    bound = SMEM_BYTES // ctas_per_sm
    if smem_bytes(dataclasses.replace(config, depth=3), k, values) > bound:
        bound = SMEM_BYTES
    for field, most in (("depth", 3), ("stages", 3), ("depth", 6), ("stages", 4), ("depth", 8)):
        config = _largest(config, field, min(most, config.k_tiles(k)), k, values, bound)
    return config


def _largest(config: Any, field: str, most: int, k: int, values: Values, bound: int = SMEM_BYTES) -> Any:
    """``config`` with the largest ``field`` up to ``most`` whose shared memory stays within ``bound``."""
    while getattr(config, field) < most:
        larger = dataclasses.replace(config, **{field: getattr(config, field) + 1})
        if smem_bytes(larger, k, values) > bound:
            break
        config = larger
    return config


def _device_kind() -> str:
    device = dispatch.default_device()
    return device.device_kind if device.platform == "gpu" else ""


@functools.cache
def _tuned(device_kind: str) -> dict[str, dict[int, Config | DecodeConfig]]:
    """Tuned configurations of a device kind: {"NxK": {number of tokens up to which it is used: configuration}}.

    An H100 is an H200 with slower memory: what one was tuned for serves the other.
    """
    name = device_kind.replace("H100 80GB HBM3", "H200").lower().replace(" ", "_") + ".json"
    file = importlib.resources.files("pallas_kernels") / "tuned" / name
    if not device_kind or not file.is_file():
        return {}
    shapes: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["matmul"]
    return {
        shape: {int(m): from_json(by_tokens[m]) for m in sorted(by_tokens, key=int)}
        for shape, by_tokens in shapes.items()
    }


def to_json(config: Config | DecodeConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, and which class they belong to."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    changes = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    return {"kernel": _KERNELS[type(config)], **changes}


def from_json(fields: dict[str, Any]) -> Config | DecodeConfig:
    """The inverse of ``to_json``."""
    rest = {name: value for name, value in fields.items() if name != "kernel"}
    return {name: kind for kind, name in _KERNELS.items()}[fields["kernel"]](**rest)


_KERNELS: dict[type, str] = {Config: "warp_specialized", DecodeConfig: "decode"}
