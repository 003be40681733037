"""The warp-specialized Hopper matmul, for many tokens and for wide weights: the kernel and its producer.

Each CTA has a producer warpgroup, which fills the stages of shared memory through TMA, and ``config.warpgroups``
consumers (``mainloop``), each of which computes 64 output channels of the same tokens. A persistent grid: CTAs take
one tile after the other, and the producer is already at the next while the consumers finish the last.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat, layouts
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.matmul.config import STORE_BUFFERS, Config, Operands, Problem
from pallas_kernels.sm90.matmul.epilogue import token_slots
from pallas_kernels.sm90.matmul.mainloop import Consumer, Scratch, Tile


def kernel(problem: Problem, config: Config, present: tuple[str, ...]) -> Any:
    """The Pallas call; its arguments are the ``present`` operands, its result is ``problem.result``."""
    tiles = pl.cdiv(problem.m, config.tile_m), pl.cdiv(problem.n, config.tile_n * config.multicast)
    clusters = min(tiles[0] * tiles[1] * config.split_k, NUM_SMS // config.multicast)
    whole = config.split_k == 1
    x_dtype = formats.E4M3 if problem.values == "e4m3" else jnp.bfloat16
    x_columns = layouts.TILE_K // problem.halves
    x_shape = config.stages, config.k_tiles * problem.halves, config.tile_m, x_columns
    swizzle = plgpu.SwizzleTransform(x_columns * jnp.dtype(x_dtype).itemsize)
    y_shape = config.warpgroups, STORE_BUFFERS, min(config.store_m, config.tile_m), problem.rows_out
    scale_shape = config.stages, config.k_tiles * problem.groups, config.tile_n
    # The producer copies the scales where a step has several tiles of K. Where it has one, the consumers load those
    # that go into tables themselves, further ahead than the stages reach.
    scales_by_tma = config.k_tiles > 1 or not problem.scale_in_table
    has_residual = "residual" in present
    scratch = Scratch(
        # One memory, two views: TMA writes rows, any number of them; WGMMA reads tiles of eight rows.
        x=plgpu.RefUnion(
            plgpu.SMEM(x_shape, x_dtype, transforms=(swizzle,)),
            plgpu.SMEM(x_shape, x_dtype, transforms=(plgpu.TilingTransform((8, x_columns)), swizzle)),
        ),
        words=plgpu.SMEM((config.stages, config.warpgroups, config.k_tiles, 4, 256), jnp.int32),
        y=plgpu.SMEM(y_shape, jnp.bfloat16, transforms=(plgpu.SwizzleTransform(2 * problem.rows_out),))
        if whole
        else None,
        tokens=plgpu.SMEM((config.warpgroups, token_slots(config.tile_m)), jnp.int32) if whole else None,
        scales=plgpu.SMEM(scale_shape, problem.scale_dtype) if scales_by_tma else None,
        full=plgpu.Barrier(num_barriers=config.stages, num_arrivals=2 + scales_by_tma),
        free=plgpu.SMEM((config.stages, 2), jnp.int32),
        residual_full=plgpu.Barrier(num_barriers=STORE_BUFFERS * config.warpgroups) if has_residual else None,
    )

    def body(*refs: Any, **scratch_refs: Any) -> None:
        named = dict(zip((*present, "y"), refs, strict=True))
        operands = Operands(**{name: named.get(name) for name in Operands._fields})
        scratch = Scratch(**{name: scratch_refs.get(name) for name in Scratch._fields})
        _cta(problem, config, operands, scratch, tiles, clusters)

    return plgpu.kernel(
        body,
        out_type=problem.result(config.split_k),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(config.multicast,),
        cluster_names=("peer",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        scratch_types={name: value for name, value in scratch._asdict().items() if value is not None},
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="int4_matmul",
    )


def _cta(
    problem: Problem,
    config: Config,
    operands: Operands,
    scratch: Scratch,
    tile_counts: tuple[int, int],
    clusters: int,
) -> None:
    """One CTA: the last warpgroup is the producer, the others are consumers."""
    m_tiles, n_tiles = tile_counts
    total = m_tiles * n_tiles * config.split_k
    wg, peer, cluster = lax.axis_index("wg"), lax.axis_index("peer"), lax.axis_index("cluster")
    sync.init_barriers(scratch.free, 4 * config.warpgroups * config.multicast, cluster=config.multicast > 1)

    def tile(i: jax.Array | int) -> Tile:
        """This CTA's i-th tile; past its last any, of which only scales are loaded, in vain."""
        at = jnp.minimum(cluster + i * clusters, total - 1)
        part = jnp.int32(0)
        if config.split_k > 1:
            at, part = lax.div(at, jnp.int32(config.split_k)), lax.rem(at, jnp.int32(config.split_k))
        m_tile, n_tile = plgpu.planar_snake(at, (m_tiles, n_tiles), 0, min(config.band, m_tiles))
        n_cta = n_tile * config.multicast + peer if config.multicast > 1 else n_tile
        return Tile(m_tile * config.tile_m, n_cta * config.tile_n, part)

    def tiles(visit: Any, begin: Any) -> Any:
        """Fold ``visit(tile, the one after it, carry)`` over this CTA's tiles, from ``begin(first tile)``."""

        def step(i: jax.Array, carry: Any) -> Any:
            return visit(tile(i), tile(i + 1), carry)

        count = lax.div(total - cluster + clusters - 1, jnp.int32(clusters))
        return lax.fori_loop(0, count, step, begin(tile(0)))

    registers = _registers(config)

    @pl.when(wg == config.warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        _produce(problem, config, operands, scratch, tiles)

    @pl.when(wg < config.warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        Consumer(problem, config, operands, scratch, wg).run(tiles)


def _produce(
    problem: Problem,
    config: Config,
    operands: Operands,
    scratch: Scratch,
    tiles: Any,
) -> None:
    """The producer: copy x and packed weights of one step after the other, tile after tile, as stages become free."""
    halves, k_tiles, steps = problem.halves, config.k_tiles, config.steps(problem.k)
    x_rows, _ = scratch.x

    def advance(slot: jax.Array, parity: jax.Array) -> tuple[jax.Array, jax.Array]:
        wrapped = slot == config.stages - 1
        return jnp.where(wrapped, 0, slot + 1), jnp.where(wrapped, 1 - parity, parity)

    def visit(tile: Tile, _: Tile, carry: Any) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            slot, parity = carry
            sync.wait(scratch.free, slot, parity)
            # Past the end of K TMA fills with zeros.
            k_tile = (tile.part * steps + i) * k_tiles
            plgpu.copy_gmem_to_smem(
                operands.x.at[pl.ds(tile.token, config.tile_m), pl.ds(k_tile * halves, k_tiles * halves)],
                jax_compat.transpose_ref(x_rows.at[slot], (1, 0, 2)),
                scratch.full.at[slot],
                collective_axes="peer" if config.multicast > 1 else None,
            )
            plgpu.copy_gmem_to_smem(
                operands.words.at[pl.ds(tile.channel // layouts.TILE_N, config.warpgroups), pl.ds(k_tile, k_tiles)],
                scratch.words.at[slot],
                scratch.full.at[slot],
            )
            if scratch.scales is not None:
                groups = k_tiles * problem.groups
                plgpu.copy_gmem_to_smem(
                    operands.group_scale.at[pl.ds(k_tile * problem.groups, groups), pl.ds(tile.channel, config.tile_n)],
                    scratch.scales.at[slot],
                    scratch.full.at[slot],
                )
            return advance(slot, parity)

        return lax.fori_loop(0, steps, step, carry)

    # A new barrier counts as having completed a phase of parity 1, so the first wait for a free slot returns at once.
    carry = tiles(visit, lambda _: (jnp.int32(0), jnp.int32(1)))
    if config.multicast > 1:
        # The cluster's other CTA may still arrive on this one's barriers: do not exit before it has.
        def drain(_: jax.Array, carry: Any) -> Any:
            sync.wait(scratch.free, *carry)
            return advance(*carry)

        lax.fori_loop(0, config.stages, drain, carry)


def _registers(config: Config) -> tuple[int, int] | None:
    """Registers for each thread of the producer and of the consumers; None where an even share is enough."""
    if config.warpgroups == 2 and config.tile_m >= 128:
        return 24, 240
    if config.warpgroups == 4 and config.tile_m > 32:
        return 24, 112
    return None
