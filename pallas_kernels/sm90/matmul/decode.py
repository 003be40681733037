"""The Hopper matmul for few tokens, which should take no longer than reading the weights.

Each warpgroup computes 64 output channels over its part of K and needs no other until its sum is done. A thread's
share of a packed tile is 32 bytes that no other thread reads, so each thread copies its own (cp.async, ``depth``
tiles ahead): no barrier, producer or descriptor stands between the kernel's start and the first read. x and the
group scales come in chunks of ``CHUNK`` tiles through TMA.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat, layouts
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.matmul import sums, weights
from pallas_kernels.sm90.matmul.config import (
    CHUNK,
    STORE_BUFFERS,
    DecodeConfig,
    Operands,
    Problem,
    decode_stages,
    word_slots,
)
from pallas_kernels.sm90.matmul.epilogue import Epilogue, token_slots


class Scratch(NamedTuple):
    """Memory and barriers of a CTA."""

    x: Any  # (rows for TMA, tiles for WGMMA), one memory: [k_warpgroups * stages, CHUNK * halves, tile_m, columns]
    words: Any  # int32 [warpgroups, depth * 1024]
    scales: Any | None  # [k_warpgroups * stages, CHUNK * groups, channels]
    full: Any  # [k_warpgroups * stages], TMA arrives on these
    free: Any | None  # raw mbarriers [k_warpgroups * stages, 2]; None if each slot is filled once
    y: Any | None  # bf16 [columns, STORE_BUFFERS, tokens, rows_out]; None with split K
    tokens: Any | None  # float32, as int32 [columns, token_slots]
    residual_full: Any | None  # [columns * STORE_BUFFERS]


def kernel(problem: Problem, config: DecodeConfig, present: tuple[str, ...]) -> Any:
    """The Pallas call; its arguments are the ``present`` operands, its result is ``problem.result``."""
    columns, stages = config.columns, config.k_warpgroups * decode_stages(config, problem.k)
    x_columns = layouts.TILE_K // problem.halves
    x_dtype = formats.E4M3 if problem.values == "e4m3" else jnp.bfloat16
    x_shape = stages, CHUNK * problem.halves, config.tile_m, x_columns
    swizzle = plgpu.SwizzleTransform(x_columns * jnp.dtype(x_dtype).itemsize)
    whole = config.split_k == 1
    # Where there is one chunk, the threads that build its tables load the scales themselves, before anything else. In
    # a loop a value loaded ahead is moved to another register at the iteration's end, and the move waits for it.
    scales_by_tma = config.k_tiles(problem.k) > CHUNK or not problem.scale_in_table
    y_shape = columns, STORE_BUFFERS, 16 if config.tile_m % 16 == 0 else 8, problem.rows_out
    has_residual = "residual" in present
    scratch = Scratch(
        x=plgpu.RefUnion(
            plgpu.SMEM(x_shape, x_dtype, transforms=(swizzle,)),
            plgpu.SMEM(x_shape, x_dtype, transforms=(plgpu.TilingTransform((8, x_columns)), swizzle)),
        ),
        words=plgpu.SMEM((config.warpgroups, word_slots(config, problem.k) * 1024), jnp.int32),
        scales=plgpu.SMEM((stages, CHUNK * problem.groups, columns * layouts.TILE_N), problem.scale_dtype)
        if scales_by_tma
        else None,
        full=plgpu.Barrier(num_barriers=stages, num_arrivals=1 + scales_by_tma),
        free=plgpu.SMEM((stages, 2), jnp.int32) if config.k_tiles(problem.k) > CHUNK * config.stages else None,
        y=plgpu.SMEM(y_shape, jnp.bfloat16, transforms=(plgpu.SwizzleTransform(2 * problem.rows_out),))
        if whole
        else None,
        tokens=plgpu.SMEM((columns, token_slots(config.tile_m)), jnp.int32) if whole else None,
        residual_full=plgpu.Barrier(num_barriers=STORE_BUFFERS * columns) if has_residual else None,
    )

    def body(*refs: Any, **scratch_refs: Any) -> None:
        named = dict(zip((*present, "y"), refs, strict=True))
        operands = Operands(**{name: named.get(name) for name in Operands._fields})
        wg = lax.axis_index("wg")
        k_wg, column = (wg % config.k_warpgroups, wg // config.k_warpgroups) if config.k_warpgroups > 1 else (0, wg)
        scratch = Scratch(**{name: scratch_refs.get(name) for name in Scratch._fields})
        tile, part, row = (lax.axis_index(name) for name in ("tile", "part", "row"))
        _Warpgroup(problem, config, operands, scratch, wg, k_wg, column, tile, part, row * config.tile_m).run()

    return plgpu.kernel(
        body,
        out_type=problem.result(config.split_k),
        grid=(pl.cdiv(problem.n, columns * layouts.TILE_N), config.split_k, pl.cdiv(problem.m, config.tile_m)),
        grid_names=("tile", "part", "row"),
        num_threads=config.warpgroups,
        thread_name="wg",
        scratch_types={name: value for name, value in scratch._asdict().items() if value is not None},
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="int4_matmul_decode",
    )


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """What one warpgroup does.

    Attributes:
        problem, config, operands: of the call.
        scratch: the CTA's memory.
        wg: index of the warpgroup.
        k_wg: which of the ``config.k_warpgroups`` parts of the CTA's K it multiplies.
        column: which of the CTA's ``config.columns`` times 64 output channels it computes.
        tile: which tile of output channels the CTA computes.
        part: which of the ``config.split_k`` parts of K the CTA multiplies.
        token: the CTA's first.
    """

    problem: Problem
    config: DecodeConfig
    operands: Operands
    scratch: Scratch
    wg: jax.Array
    k_wg: jax.Array | int
    column: jax.Array
    tile: jax.Array
    part: jax.Array
    token: jax.Array

    @property
    def _steps(self) -> int:
        return self.config.k_tiles(self.problem.k)

    @property
    def _stages(self) -> int:
        return decode_stages(self.config, self.problem.k)

    @property
    def _first(self) -> jax.Array:
        """Where its part of K begins, in tiles."""
        return (self.part * self.config.k_warpgroups + self.k_wg) * self._steps

    @property
    def _n_tile(self) -> jax.Array:
        return self.tile * self.config.columns + self.column

    @property
    def _channel(self) -> jax.Array:
        return self._n_tile * layouts.TILE_N

    def run(self) -> None:
        """Start all loads, multiply, reduce over the warpgroups, and store y or a partial sum."""
        scratch, config, problem = self.scratch, self.config, self.problem
        # x first: its few bytes would queue behind the weights.
        self._if_producer(self._fill_stages)
        scales = self._load_scales() if scratch.scales is None else ()
        for i in range(min(config.depth, self._steps)):
            self._copy_words(jnp.int32(i), jnp.int32(i))
        if scratch.free is not None:
            sync.init_barriers(scratch.free, 4 * config.columns, cluster=False)
        if config.split_k > 1:
            total = self._combine(self._sum(scales))
            self._if_has_sum(lambda: sums.store_partial(total, self.operands.y, self.part, self.token, self._n_tile))
            return
        epilogue = Epilogue(
            problem, self.operands, config.tile_m, self.column, scratch.y, scratch.tokens, scratch.residual_full
        )
        loaded = epilogue.load(self.token, self._channel)
        self._if_has_sum(lambda: epilogue.load_residual(loaded))
        total = self._combine(self._sum(scales))

        def store() -> None:
            epilogue.store(sums.sum_to_accumulator(total), loaded)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        self._if_has_sum(store)

    def _if_producer(self, body: Callable[[], None]) -> None:
        """Run ``body`` in the warpgroup that copies x for those with the same part of K."""
        if self.config.columns == 1:
            body()
        else:
            pl.when(self.column == 0)(body)

    def _if_has_sum(self, body: Callable[[], None]) -> None:
        """Run ``body`` in the warpgroup that has the whole sum of those with the same channels."""
        if self.config.k_warpgroups == 1:
            body()
        else:
            pl.when(self.k_wg == 0)(body)

    # --- loads ----------------------------------------------------------------------------------------

    def _copy_words(self, step: jax.Array, slot: jax.Array) -> None:
        """Start to copy a step's packed tile into a slot; without such a step an empty group of copies."""
        tiles_n, tiles_k = self.operands.words.shape[:2]
        # Past the end of K the last tile is copied again, to be multiplied by x's zeros.
        k_tile = jnp.minimum(self._first + step, tiles_k - 1)
        tile = jnp.minimum(self._n_tile, tiles_n - 1) * tiles_k + k_tile
        weights.copy_tile(self.operands.words, tile, self.scratch.words.at[self.wg], slot, step < self._steps)

    def _slot(self, slot: jax.Array) -> jax.Array:
        """Index of this part of K's slot among all of them."""
        return self.k_wg * self._stages + slot

    def _fill_stages(self) -> None:
        """Start to copy the first chunks of x."""
        for i in range(self._stages):
            self._copy_chunk(jnp.int32(i), jnp.int32(i))

    def _copy_chunk(self, chunk: jax.Array, slot: jax.Array) -> None:
        """Start to copy a chunk of x and of the group scales; past the end of K they are zeros."""
        problem, at = self.problem, self._slot(slot)
        k_tile = self._first + chunk * CHUNK
        x_rows, _ = self.scratch.x
        plgpu.copy_gmem_to_smem(
            self.operands.x.at[
                pl.ds(self.token, self.config.tile_m), pl.ds(k_tile * problem.halves, CHUNK * problem.halves)
            ],
            jax_compat.transpose_ref(x_rows.at[at], (1, 0, 2)),
            self.scratch.full.at[at],
        )
        if self.scratch.scales is not None:
            channels = self.config.columns * layouts.TILE_N
            plgpu.copy_gmem_to_smem(
                self.operands.group_scale.at[
                    pl.ds(k_tile * problem.groups, CHUNK * problem.groups), pl.ds(self.tile * channels, channels)
                ],
                self.scratch.scales.at[at],
                self.scratch.full.at[at],
            )

    def _load_scales(self) -> tuple[jax.Array, ...]:
        """Start to load the only chunk's scales, for ``weights.build_tables``."""
        group = self._first * self.problem.groups
        return tuple(
            weights.load_four_scales(self.operands.group_scale, group + 4 * i, self._channel)
            for i in range(self.problem.groups)
        )

    # --- sums -----------------------------------------------------------------------------------------

    def _sum(self, scales: tuple[jax.Array, ...]) -> jax.Array:
        """The (scaled) sum over this warpgroup's part of K, raw float32."""
        chunks, rest = divmod(self._steps, CHUNK)
        carry = jnp.int32(0), jnp.int32(0), jnp.int32(0), sums.zero_sum(self.config.tile_m)
        if chunks:
            carry = lax.fori_loop(0, chunks, lambda i, carry: self._chunk(i, scales, carry, CHUNK), carry)
        if rest:
            carry = self._chunk(jnp.int32(chunks), scales, carry, rest)
        return carry[-1]

    def _chunk(self, i: jax.Array, scales: tuple[jax.Array, ...], carry: Any, count: int) -> Any:
        """``count`` steps; carries (slot of x, parity of slots freed before it, slot of the weights, sum)."""
        slot, parity, word_slot, total = carry
        config, problem = self.config, self.problem
        at = self._slot(slot)
        plgpu.barrier_wait(self.scratch.full.at[at])
        if self.scratch.free is not None:
            parity = self._refill(i, slot, parity)
        copied = self.scratch.scales
        if copied is not None:
            copied = copied.at[at, :, pl.ds(self.column * layouts.TILE_N, layouts.TILE_N)]
        depth = min(config.depth, self._steps)
        word_slots = [word_slot]
        for _ in range(count):
            word_slots.append(jnp.where(word_slots[-1] == depth - 1, 0, word_slots[-1] + 1))

        def take(t: int) -> jax.Array:
            return weights.take_tile(self.scratch.words.at[self.wg], word_slots[t], depth - 1)

        def refill(t: int) -> None:
            self._copy_words(i * CHUNK + t + depth, word_slots[t])

        _, x_tiles = self.scratch.x

        def multiply(words: jax.Array, tables: Any, t: int, acc_ref: Any, half: int | None = None) -> None:
            weights.multiply(
                problem, words, tables, lambda part: x_tiles.at[at, t * problem.halves + part], acc_ref, half
            )

        if problem.scale_in_table:
            if copied is not None:
                scales = tuple(weights.read_four_scales(copied.at[pl.ds(4 * g, 4)]) for g in range(problem.groups))
            sets = tuple(weights.build_tables(four, problem.codebook) for four in scales)
            tables = weights.tables_by_tile(sets, CHUNK, problem.groups)

            def all_tiles(acc_ref: Any) -> jax.Array:
                for t in range(count):
                    multiply(take(t), tables[t], t, acc_ref)
                    refill(t)
                    if t > 0:
                        plgpu.wgmma_wait(problem.halves)
                return acc_ref[...]

            total = sums.add_to_sum(total, self._accumulate(all_tiles), None)
        else:
            assert copied is not None
            for t in range(count):
                words = take(t)
                for half in (0, 1) if problem.groups == 2 else (None,):

                    def one_group(acc_ref: Any, words: Any = words, t: int = t, half: int | None = half) -> jax.Array:
                        multiply(words, None, t, acc_ref, half)
                        return acc_ref[...]

                    scale = sums.read_group_scale(copied.at[t * problem.groups + (half or 0)])
                    total = sums.add_to_sum(total, self._accumulate(one_group), scale)
                refill(t)
        if self.scratch.free is not None:
            sync.arrive(self.scratch.free, at, cluster_size=1)
        return jnp.where(slot == self._stages - 1, 0, slot + 1), parity, word_slots[-1], total

    def _accumulate(self, body: Callable[[Any], jax.Array]) -> jax.Array:
        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, self.config.tile_m), jnp.float32))

    def _refill(self, i: jax.Array, slot: jax.Array, parity: jax.Array) -> jax.Array:
        """Start to copy a later chunk into the slot of the chunk before the i-th; the parity for the next slot."""
        before = jnp.where(slot == 0, self._stages - 1, slot - 1)
        chunks = pl.cdiv(self._steps, CHUNK)

        def body() -> None:
            @pl.when((i > 0) & (i + self._stages - 1 < chunks))
            def _() -> None:
                sync.wait(self.scratch.free, self._slot(before), parity)
                self._copy_chunk(i + self._stages - 1, before)

        self._if_producer(body)
        return jnp.where((i > 0) & (before == self._stages - 1), 1 - parity, parity)

    def _combine(self, total: jax.Array) -> jax.Array:
        """The sum over the warpgroups that share output channels, in the first of them."""
        config = self.config
        if config.k_warpgroups == 1:
            return total
        # Each warpgroup stores its sum over its packed weights, which none but its own threads read.
        words = self.scratch.words
        pl.when(self.k_wg > 0)(lambda: sums.store_sum(total, words.at[self.wg]))
        sync.cta_barrier()
        for i in range(1, config.k_warpgroups):
            # Warpgroups other than the first add something to sums that nobody reads.
            total = sums.add_stored_sum(total, words.at[jnp.minimum(self.wg + i, config.warpgroups - 1)])
        return total
