"""The Hopper matmul for few tokens: nothing but reading the weights should take time.

Each warpgroup computes 64 output channels over its part of K and needs no other until its sum is
done. A thread's share of a packed tile is 32 bytes that no other thread wants, so it copies them
itself (cp.async, ``depth`` tiles ahead) and no barrier, producer or descriptor stands between the
start of the kernel and the first read. x and the group scales come in chunks through TMA.
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
from pallas_kernels.sm90.matmul import epilogue as outputs
from pallas_kernels.sm90.matmul import weights
from pallas_kernels.sm90.matmul.config import CHUNK, STORE_BUFFERS, DecodeConfig, Problem, decode_stages, word_slots
from pallas_kernels.sm90.matmul.output import Operands, Output


class Scratch(NamedTuple):
    """Memory and barriers of a CTA."""

    x: Any  # (rows for TMA, tiles for WGMMA), one memory: [k_warpgroups * stages, CHUNK * halves, tile_m, columns]
    words: Any  # int32 [warpgroups, depth * 1024]
    scales: Any | None  # [k_warpgroups * stages, CHUNK * groups, channels]
    full: Any  # [k_warpgroups * stages], TMA arrives
    free: Any | None  # raw mbarriers [k_warpgroups * stages, 2]; None if nothing is loaded twice
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
    # A single chunk's scales are read by the threads that build its tables, before anything else. In
    # a loop a value read ahead is moved to another register at the end, and the move waits for it.
    in_ring = config.k_tiles(problem.k) > CHUNK or not problem.scale_in_table
    y_shape = columns, STORE_BUFFERS, 16 if config.tile_m % 16 == 0 else 8, problem.rows_out
    has_residual = "residual" in present
    scratch = Scratch(
        x=plgpu.RefUnion(
            plgpu.SMEM(x_shape, x_dtype, transforms=(swizzle,)),
            plgpu.SMEM(x_shape, x_dtype, transforms=(plgpu.TilingTransform((8, x_columns)), swizzle)),
        ),
        words=plgpu.SMEM((config.warpgroups, word_slots(config, problem.k) * 1024), jnp.int32),
        scales=plgpu.SMEM((stages, CHUNK * problem.groups, columns * layouts.TILE_N), problem.scale_dtype)
        if in_ring
        else None,
        full=plgpu.Barrier(num_barriers=stages, num_arrivals=1 + in_ring),
        free=plgpu.SMEM((stages, 2), jnp.int32) if config.k_tiles(problem.k) > CHUNK * config.stages else None,
        y=plgpu.SMEM(y_shape, jnp.bfloat16, transforms=(plgpu.SwizzleTransform(2 * problem.rows_out),))
        if whole
        else None,
        tokens=plgpu.SMEM((columns, outputs.token_slots(config.tile_m)), jnp.int32) if whole else None,
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
        grid=(-(-problem.n // (columns * layouts.TILE_N)), config.split_k, -(-problem.m // config.tile_m)),
        grid_names=("tile", "part", "row"),
        num_threads=config.warpgroups,
        thread_name="wg",
        scratch_types={name: value for name, value in scratch._asdict().items() if value is not None},
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="int4_matmul_decode",
    )


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """One warpgroup.

    Attributes:
        wg: its index.
        k_wg: which of ``config.k_warpgroups`` parts of the CTA's K it has.
        column: which of the CTA's ``config.columns`` times 64 output channels it has.
        tile: which tile of output channels the CTA has.
        part: which of ``config.split_k`` parts of K the CTA has.
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
        """All of it."""
        scratch, config, problem = self.scratch, self.config, self.problem
        # Few bytes first: they would queue behind the weights.
        self._feeder(self._feed_first)
        scales = self._load_scales() if scratch.scales is None else ()
        for i in range(min(config.depth, self._steps)):
            self._copy_words(jnp.int32(i), jnp.int32(i))
        if scratch.free is not None:
            sync.init_barriers(scratch.free, 4 * config.columns, cluster=False)
        if config.split_k > 1:
            total = self._combine(self._sum(scales))
            self._finisher(lambda: outputs.store_partial(total, self.operands.y, self.part, self.token, self._n_tile))
            return
        output = Output(
            problem, self.operands, config.tile_m, self.column, scratch.y, scratch.tokens, scratch.residual_full
        )
        epilogue = output.begin(self.token, self._channel)
        self._finisher(lambda: output.begin_residual(epilogue))
        total = self._combine(self._sum(scales))

        def finish() -> None:
            output.finish(outputs.sum_to_accumulator(total), epilogue)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        self._finisher(finish)

    def _feeder(self, body: Callable[[], None]) -> None:
        """Run ``body`` in the warpgroup that loads x for those with the same K."""
        if self.config.columns == 1:
            body()
        else:
            pl.when(self.column == 0)(body)

    def _finisher(self, body: Callable[[], None]) -> None:
        """Run ``body`` in the warpgroup that has the sum of those with the same channels."""
        if self.config.k_warpgroups == 1:
            body()
        else:
            pl.when(self.k_wg == 0)(body)

    # --- loads ----------------------------------------------------------------------------------------

    def _copy_words(self, step: jax.Array, slot: jax.Array) -> None:
        """Start to copy the packed tile of a step, if there is such a step, into a slot."""
        tiles_n, tiles_k = self.operands.words.shape[:2]
        # Past the end of K the last tile comes again, to be multiplied by zeros.
        k_tile = jnp.minimum(self._first + step, tiles_k - 1)
        tile = jnp.minimum(self._n_tile, tiles_n - 1) * tiles_k + k_tile
        weights.copy_tile(self.operands.words, tile, self.scratch.words.at[self.wg], slot, step < self._steps)

    def _slot(self, slot: jax.Array) -> jax.Array:
        """Index of this part of K's slot among all of them."""
        return self.k_wg * self._stages + slot

    def _feed_first(self) -> None:
        """Fill the ring."""
        for i in range(self._stages):
            self._feed(jnp.int32(i), jnp.int32(i))

    def _feed(self, chunk: jax.Array, slot: jax.Array) -> None:
        """Start to load a chunk of x and of the group scales; past the end of K they are zeros."""
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
        """Start to read the only chunk's scales, for ``weights.build_tables``."""
        group = self._first * self.problem.groups
        return tuple(
            weights.load_four_scales(self.operands.group_scale, group + 4 * i, self._channel)
            for i in range(self.problem.groups)
        )

    # --- sums -----------------------------------------------------------------------------------------

    def _sum(self, scales: tuple[jax.Array, ...]) -> jax.Array:
        """The (scaled) sum over this warpgroup's part of K, raw float32."""
        chunks, rest = divmod(self._steps, CHUNK)
        carry = jnp.int32(0), jnp.int32(0), jnp.int32(0), outputs.zero_sum(self.config.tile_m)
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
        ring = self.scratch.scales
        if ring is not None:
            ring = ring.at[at, :, pl.ds(self.column * layouts.TILE_N, layouts.TILE_N)]
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
            if ring is not None:
                scales = tuple(weights.read_four_scales(ring.at[pl.ds(4 * g, 4)]) for g in range(problem.groups))
            sets = tuple(weights.build_tables(four, problem.codebook) for four in scales)
            tables = weights.tables_by_tile(sets, CHUNK, problem.groups)

            def all_tiles(acc_ref: Any) -> jax.Array:
                for t in range(count):
                    multiply(take(t), tables[t], t, acc_ref)
                    refill(t)
                    if t > 0:
                        plgpu.wgmma_wait(problem.halves)
                return acc_ref[...]

            total = outputs.add_to_sum(total, self._accumulate(all_tiles), None)
        else:
            assert ring is not None
            for t in range(count):
                words = take(t)
                for half in (0, 1) if problem.groups == 2 else (None,):

                    def one_group(acc_ref: Any, words: Any = words, t: int = t, half: int | None = half) -> jax.Array:
                        multiply(words, None, t, acc_ref, half)
                        return acc_ref[...]

                    scale = outputs.read_group_scale(ring.at[t * problem.groups + (half or 0)])
                    total = outputs.add_to_sum(total, self._accumulate(one_group), scale)
                refill(t)
        if self.scratch.free is not None:
            sync.arrive(self.scratch.free, at, cluster_size=1)
        return jnp.where(slot == self._stages - 1, 0, slot + 1), parity, word_slots[-1], total

    def _accumulate(self, body: Callable[[Any], jax.Array]) -> jax.Array:
        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, self.config.tile_m), jnp.float32))

    def _refill(self, i: jax.Array, slot: jax.Array, parity: jax.Array) -> jax.Array:
        """Load a later chunk into the slot of the chunk before the i-th; the parity for the next slot."""
        before = jnp.where(slot == 0, self._stages - 1, slot - 1)
        chunks = -(-self._steps // CHUNK)

        def body() -> None:
            @pl.when((i > 0) & (i + self._stages - 1 < chunks))
            def _() -> None:
                sync.wait(self.scratch.free, self._slot(before), parity)
                self._feed(i + self._stages - 1, before)

        self._feeder(body)
        return jnp.where((i > 0) & (before == self._stages - 1), 1 - parity, parity)

    def _combine(self, total: jax.Array) -> jax.Array:
        """The sum over the warpgroups that share output channels, in the first of them."""
        config = self.config
        if config.k_warpgroups == 1:
            return total
        # Each warpgroup leaves its sum where its weights were: its threads read no others.
        words = self.scratch.words
        pl.when(self.k_wg > 0)(lambda: outputs.leave_sum(total, words.at[self.wg]))
        sync.cta_barrier()
        for i in range(1, config.k_warpgroups):
            # The others add garbage to a sum that nobody reads.
            total = outputs.add_left_sum(total, words.at[jnp.minimum(self.wg + i, config.warpgroups - 1)])
        return total
