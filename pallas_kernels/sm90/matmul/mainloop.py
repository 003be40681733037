"""The consumers of the warp-specialized Hopper matmul: the main loops.

Each step dequantizes a tile of weights in registers and multiplies it by x in shared memory; dequantization of one
step overlaps the WGMMA of the step before it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import layouts
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.matmul import sums, weights
from pallas_kernels.sm90.matmul.config import Config, Operands, Problem
from pallas_kernels.sm90.matmul.epilogue import Epilogue

# Steps unrolled in an iteration of the overlapped main loop. At an iteration's end no WGMMA is in flight, so more
# steps hide more; they also take longer to lower.
UNROLL = 8


class Scratch(NamedTuple):
    """Memory and barriers of a CTA."""

    x: Any  # (rows for TMA, tiles for WGMMA), one memory: [stages, k_tiles * halves, tile_m, columns]
    words: Any  # int32 [stages, warpgroups, k_tiles, 4, 256]
    scales: Any | None  # [stages, k_tiles * groups, tile_n]
    y: Any | None  # bf16 [warpgroups, STORE_BUFFERS, tokens, rows_out]; None with split K
    tokens: Any | None  # float32, as int32 [warpgroups, token_slots]
    full: Any  # [stages], the producer's TMA arrives on these
    free: Any  # raw mbarriers [stages, 2], the consumers' warps arrive on these; see ``sync``
    residual_full: Any | None  # [warpgroups * STORE_BUFFERS]


class Tile(NamedTuple):
    """First token and channel of a tile of y, and which part of K it is to be summed over."""

    token: jax.Array
    channel: jax.Array
    part: jax.Array


Carry: TypeAlias = tuple[jax.Array, tuple[jax.Array, ...]]  # next slot (of ``stages``), scales that are being loaded
Visit: TypeAlias = Callable[[Tile, Tile, Carry], Carry]  # of a tile and the one after it


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A warpgroup that computes 64 output channels of each of its CTA's tiles.

    Attributes:
        problem, config, operands: of the call.
        scratch: the CTA's memory.
        wg: index of the warpgroup among the consumers.
    """

    problem: Problem
    config: Config
    operands: Operands
    scratch: Scratch
    wg: jax.Array

    @property
    def steps(self) -> int:
        """Of ``config.k_tiles`` tiles of 128 inputs for each tile of y, or part of one."""
        return self.config.steps(self.problem.k)

    def run(self, tiles: Callable[[Visit, Callable[[Tile], Carry]], Carry]) -> None:
        """All tiles; ``tiles(visit, begin)`` folds ``visit`` over them, from ``begin(first tile)``."""
        scratch = self.scratch
        epilogue = Epilogue(
            self.problem, self.operands, self.config.tile_m, self.wg, scratch.y, scratch.tokens, scratch.residual_full
        )

        def visit_whole(tile: Tile, next_tile: Tile, carry: Carry) -> Carry:
            loaded = epilogue.load(tile.token, self._rows(tile.channel))
            epilogue.load_residual(loaded)
            acc, carry = self._sum(tile, next_tile, carry)
            epilogue.store(acc, loaded)
            return carry

        def visit_part(tile: Tile, next_tile: Tile, carry: Carry) -> Carry:
            acc, carry = self._sum(tile, next_tile, carry)
            n_tile = lax.div(self._rows(tile.channel), jnp.int32(layouts.TILE_N))
            sums.store_partial(sums.sum_from_accumulator(acc), self.operands.y, tile.part, tile.token, n_tile)
            return carry

        whole = self.config.split_k == 1
        tiles(visit_whole if whole else visit_part, lambda first: (jnp.int32(0), self._load_scales(first, 0)))
        if whole:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sum(self, tile: Tile, next_tile: Tile, carry: Carry) -> tuple[jax.Array, Carry]:
        """The sum over the tile's part of K; carries the next slot and the first scales of the tile it is for."""
        if self.config.promote:
            return self._promoted(tile, next_tile, *carry)
        if self.config.k_tiles == 1:
            return self._overlapped(tile, next_tile, *carry)
        slot, scales = carry
        acc, slot = self._batched(slot)
        return acc, (slot, scales)

    # --- main loop ------------------------------------------------------------------------------------

    def _rows(self, channel: jax.Array) -> jax.Array:
        return channel + self.wg * layouts.TILE_N

    @property
    def _unit(self) -> int:
        """Tiles of K whose tables are built together."""
        return self.config.promote or (UNROLL if self.config.k_tiles == 1 else self.config.k_tiles)

    @property
    def _table_sets(self) -> int:
        return pl.cdiv(self._unit * self.problem.groups, 4)

    def _load_scales(self, tile: Tile, step: jax.Array | int) -> tuple[jax.Array, ...]:
        """Start to load from GMEM the scales of a unit that begins with ``step``; () if the producer copies them.

        They are needed a unit later. Until then nothing may be done to them, not even a move to another register,
        or all of the warp waits for the load.
        """
        if self.scratch.scales is not None:
            return ()
        group, rows = (tile.part * self.steps + step) * self.problem.groups, self._rows(tile.channel)
        scales = self.operands.group_scale
        return tuple(
            weights.load_four_scales(scales, jnp.asarray(group + 4 * i, jnp.int32), rows)
            for i in range(self._table_sets)
        )

    def _copied_scales(self, slot: jax.Array, first: int, count: int = 1) -> Any:
        """What the producer has copied: scales of ``count`` groups of a step for this warpgroup's channels."""
        assert self.scratch.scales is not None
        return self.scratch.scales.at[slot, pl.ds(first, count), pl.ds(self.wg * layouts.TILE_N, layouts.TILE_N)]

    def _build(self, scales: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Sets of four tables from a unit's scales."""
        return tuple(weights.build_tables(four, self.problem.codebook) for four in scales)

    def _tables(self, sets: tuple[jax.Array, ...]) -> weights.Tables | None:
        return weights.tables_by_tile(sets, self._unit, self.problem.groups) if sets else None

    def _fetch(self, slot: jax.Array) -> jax.Array:
        """Wait for a step's operands and read its (first) packed tile."""
        plgpu.barrier_wait(self.scratch.full.at[slot])
        return weights.load_words(self.scratch.words.at[slot, self.wg, 0])

    def _multiply(
        self, words: jax.Array, tables: Any, slot: jax.Array, acc_ref: Any, tile: int = 0, half: int | None = None
    ) -> None:
        """Dequantize a tile (or half of it) and issue its WGMMAs, without waiting for them."""
        _, x_tiles = self.scratch.x
        first = tile * self.problem.halves
        weights.multiply(self.problem, words, tables, lambda i: x_tiles.at[slot, first + i], acc_ref, half)

    def _release(self, slot: jax.Array) -> None:
        sync.arrive(self.scratch.free, slot, cluster_size=self.config.multicast)

    def _following(self, slot: jax.Array) -> jax.Array:
        return jnp.where(slot == self.config.stages - 1, 0, slot + 1)

    def _accumulate(self, body: Callable[[Any], Any]) -> Any:
        """``body`` with a new accumulator."""
        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, self.config.tile_m), jnp.float32))

    def _issue(
        self, words: jax.Array, tables: Any, slot: jax.Array, count: int, acc_ref: Any, half: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Issue ``count`` steps from ``words`` on, each dequantized while the tensor cores multiply the one before.

        Returns the next slot, and the last step's, which is in flight: the caller waits for it and releases it.
        """
        previous = slot
        for i in range(count):
            self._multiply(words, tables and tables[i], slot, acc_ref, half=half)
            if i > 0:
                plgpu.wgmma_wait(self.problem.halves)
                self._release(previous)
            previous, slot = slot, self._following(slot)
            if i < count - 1:
                words = self._fetch(slot)
        return slot, previous

    def _overlapped(self, tile: Tile, next_tile: Tile, slot: jax.Array, scales: Any) -> tuple[jax.Array, Carry]:
        """``_sum`` in steps of one tile of K, each dequantized while the tensor cores multiply the one before."""
        iterations, rest = divmod(self.steps - 1, UNROLL)

        def body(acc_ref: Any) -> tuple[jax.Array, Carry]:
            def iteration(i: jax.Array, carry: Any) -> Any:
                words, slot, sets = carry
                scales = self._load_scales(tile, (i + 1) * UNROLL)
                following, used = self._issue(words, self._tables(sets), slot, UNROLL, acc_ref)
                # The next iteration's first operands are made while this one's last step is in flight. It must end
                # here: the compiler serializes all WGMMAs of a loop that leaves one in flight.
                sets = self._build(scales)
                words = self._fetch(following)
                plgpu.wgmma_wait(0)
                self._release(used)
                return words, following, sets

            first = self._fetch(slot), slot, self._build(scales)
            words, current, sets = lax.fori_loop(0, iterations, iteration, first)
            next_scales = self._load_scales(next_tile, 0)
            following, used = self._issue(words, self._tables(sets), current, rest + 1, acc_ref)
            acc = acc_ref[...]
            self._release(used)
            return acc, (following, next_scales)

        return self._accumulate(body)

    def _batched(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As ``_overlapped`` with several tiles a step: fewer waits, for few tokens, where WGMMAs take little time."""
        k_tiles, groups = self.config.k_tiles, self.config.k_tiles * self.problem.groups

        def body(acc_ref: Any) -> tuple[jax.Array, jax.Array]:
            def step(_: Any, slot: jax.Array) -> jax.Array:
                plgpu.barrier_wait(self.scratch.full.at[slot])
                tables = None
                if self.problem.scale_in_table:
                    parts = [self._copied_scales(slot, g, min(4, groups)) for g in range(0, groups, 4)]
                    tables = self._tables(self._build(tuple(weights.read_four_scales(part) for part in parts)))
                for t in range(k_tiles):
                    words = weights.load_words(self.scratch.words.at[slot, self.wg, t])
                    self._multiply(words, tables and tables[t], slot, acc_ref, tile=t)
                    if t > 0:
                        plgpu.wgmma_wait(self.problem.halves)
                plgpu.wgmma_wait(0)
                self._release(slot)
                return self._following(slot)

            following = lax.fori_loop(0, self.steps, step, slot)
            return acc_ref[...], following

        return self._accumulate(body)

    def _promoted(self, tile: Tile, next_tile: Tile, slot: jax.Array, scales: Any) -> tuple[jax.Array, Carry]:
        """As ``_overlapped``, but every ``config.promote`` steps their (scaled) sum is added to a float32 sum.

        WGMMA's own accumulator has fewer bits.
        """
        count = self.config.promote
        by_half = self.problem.groups == 2 and not self.problem.scale_in_table
        blocks = (self.steps - 1) // count

        def factor(slot: jax.Array, half: int) -> jax.Array | None:
            if self.problem.scale_in_table:
                return None
            return sums.read_group_scale(self._copied_scales(slot, half).at[0])

        def block(carry: Any, count: int, next_scales: Any, *, last: bool = False) -> Any:
            words, slot, scales, total = carry
            tables = self._tables(self._build(scales))

            def first_half(acc_ref: Any) -> jax.Array:
                self._multiply(words, None, slot, acc_ref, half=0)
                scale = factor(slot, 0)
                return sums.add_to_sum(total, acc_ref[...], scale)

            def body(acc_ref: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
                following, used = self._issue(words, tables, slot, count, acc_ref, half=1 if by_half else None)
                scale = factor(used, int(by_half))
                after = words if last else self._fetch(following)
                acc = acc_ref[...]
                self._release(used)
                return after, following, sums.add_to_sum(total, acc, scale)

            if by_half:
                total = self._accumulate(first_half)
            words, slot, total = self._accumulate(body)
            return words, slot, next_scales, total

        carry = self._fetch(slot), slot, scales, sums.zero_sum(self.config.tile_m)
        carry = lax.fori_loop(
            0, blocks, lambda i, carry: block(carry, count, self._load_scales(tile, (i + 1) * count)), carry
        )
        next_scales = self._load_scales(next_tile, 0)
        _, slot, scales, total = block(carry, self.steps - blocks * count, next_scales, last=True)
        return sums.sum_to_accumulator(total), (slot, scales)
