"""INT4 x FP8 (and INT4 x BF16) matmul for Hopper in Pallas Mosaic GPU.

The kernel computes y^T = W x^T: a weight tile, dequantized in registers, is WGMMA's A operand and
x [M, K], row-major, is the K-major B operand in shared memory. Each CTA has one warpgroup that
feeds a ring of shared-memory stages through TMA and ``warpgroups`` that compute, each 64 output
channels of the same tokens. Dequantization of one step overlaps the WGMMA of the step before it.

FireQ (arXiv 2505.20839), INT4 x FP8 kernel; mapping and packing are ours (see ``layouts``).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from pallas_kernels import formats, jax_compat, layouts
from pallas_kernels import matmul_device_sm90 as device
from pallas_kernels.matmul_config_sm90 import NUM_SMS, TOKENS_PER_STORE, Config, Values

# Steps an iteration of the main loop; see ``run``.
UNROLL = 4


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Shapes and types of one call, all static."""

    m: int
    n: int
    k: int
    n_out: int
    groups: int
    values: Values
    scale_in_table: bool
    silu_mul: bool
    has_x_scale: bool
    has_bias: bool
    has_residual: bool


def matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "tiles_n tiles_k 2 128 4"],
    group_scale: Float[Array, "G N"],
    channel_scale: Float[Array, " N"],
    *,
    n: int,
    config: Config,
    x_scale: Float[Array, " M"] | None = None,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "M n_out"] | None = None,
    silu_mul: bool = False,
) -> Float[Array, "M n_out"]:
    """y = activation(x_scale * channel_scale * (x W^T) + bias) + residual in bfloat16.

    Args:
        x: E4M3 or bfloat16; K is a multiple of 128.
        words: the packed weight (``layouts.pack_weight``).
        group_scale: E4M3: codes become fp8(code * scale). bfloat16: the float32 sum of each group
            is multiplied by it.
        channel_scale: float32; N is n rounded up to a multiple of 64.
        n: output channels before the activation.
        config: how to cut the work.
        x_scale: float32.
        bias: float32 or bfloat16.
        residual: bfloat16, added last in float32.
        silu_mul: gate and up rows alternate in blocks of 8; the result is SiLU(gate) * up, n / 2.

    Returns:
        bfloat16; n_out is n, or n / 2 for ``silu_mul``.
    """
    m, k = x.shape
    n_out = n // 2 if silu_mul else n
    # A row of y must be a multiple of 16 bytes for TMA.
    n_stored = -(-n_out // 8) * 8
    if residual is not None and n_stored != n_out:
        residual = jnp.pad(residual, ((0, 0), (0, n_stored - n_out)))
    problem = _Problem(
        m=m,
        n=words.shape[0] * layouts.TILE_N,
        k=k,
        n_out=n_stored,
        groups=group_scale.shape[0] * layouts.TILE_K // k,
        values="e4m3" if x.dtype == formats.E4M3 else "bf16",
        scale_in_table=group_scale.dtype == formats.E4M3,
        silu_mul=silu_mul,
        has_x_scale=x_scale is not None,
        has_bias=bias is not None,
        has_residual=residual is not None,
    )
    if problem.values == "bf16":
        x = device.interleave_columns(x)
    if problem.scale_in_table:
        group_scale = lax.bitcast_convert_type(group_scale, jnp.uint8)
    words = lax.bitcast_convert_type(words, jnp.int32).reshape(*words.shape[:2], 4, 256)
    # Columns in blocks of one swizzled row of shared memory, so that TMA can lay them out one by one.
    x = x.reshape(m, -1, layouts.TILE_K // _halves(problem))
    operands = [x, words, group_scale, channel_scale]
    operands += [a for a in (x_scale, bias, residual) if a is not None]
    y = _kernel(problem, config)(*operands)
    return y[:, :n_out] if n_stored != n_out else y


def _halves(problem: _Problem) -> int:
    """WGMMA calls for a tile: two where its rows of x are 256 bytes, or its two group scales not in the table."""
    return 2 if problem.values == "bf16" or (problem.groups == 2 and not problem.scale_in_table) else 1


def _kernel(problem: _Problem, config: Config) -> Any:
    """The Pallas call for a problem, before its operands."""
    promote = config.promote
    if not problem.scale_in_table:
        promote = 1
        if config.tile_m > 128:
            raise ValueError(f"{config}: bf16 group scales need a second sum; tile_m may be at most 128")
    stages, tile_m, tile_n = config.stages, config.tile_m, config.tile_n
    m_tiles = -(-problem.m // tile_m)
    n_tiles = -(-problem.n // (tile_n * config.multicast))
    clusters = m_tiles * n_tiles
    if config.split_k == 1:
        clusters = min(clusters, NUM_SMS // config.multicast)
    rows_out = layouts.TILE_N // 2 if problem.silu_mul else layouts.TILE_N
    store_m = min(tile_m, TOKENS_PER_STORE)
    x_dtype = formats.E4M3 if problem.values == "e4m3" else jnp.bfloat16
    halves = _halves(problem)
    x_columns = layouts.TILE_K // halves
    x_swizzle = x_columns * jnp.dtype(x_dtype).itemsize
    x_shape = stages, config.k_tiles * halves, tile_m, x_columns
    y_transforms = (plgpu.SwizzleTransform(2 * rows_out),)
    scale_dtype = jnp.uint8 if problem.scale_in_table else jnp.bfloat16
    scratch = {
        # One memory, two descriptions: TMA has rows, any number of them; WGMMA wants tiles of eight.
        "x_smem": plgpu.RefUnion(
            plgpu.SMEM(x_shape, x_dtype, transforms=(plgpu.SwizzleTransform(x_swizzle),)),
            plgpu.SMEM(
                x_shape,
                x_dtype,
                transforms=(plgpu.TilingTransform((8, x_columns)), plgpu.SwizzleTransform(x_swizzle)),
            ),
        ),
        "y_smem": plgpu.SMEM(
            (config.warpgroups, config.buffers, store_m, rows_out), jnp.bfloat16, transforms=y_transforms
        ),
        "w_smem": plgpu.SMEM((stages, config.warpgroups, config.k_tiles, 4, 256), jnp.int32),
        "scale_smem": plgpu.SMEM((stages, config.k_tiles * problem.groups, tile_n), scale_dtype),
        "token_smem": plgpu.SMEM((config.warpgroups, device.token_slots(tile_m)), jnp.float32),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        "free": plgpu.SMEM((stages, 2), jnp.int32),
    }
    if problem.has_residual:
        scratch["residual_full"] = plgpu.Barrier(num_barriers=config.buffers * config.warpgroups)
    body = functools.partial(
        _body,
        problem=problem,
        config=dataclasses.replace(config, promote=promote),
        halves=halves,
        grid=(m_tiles, n_tiles, clusters),
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((problem.m, problem.n_out), jnp.bfloat16),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(config.multicast * config.split_k,),
        cluster_names=("peer",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="int4_matmul",
    )


def _body(
    x_gmem: Any,
    w_gmem: Any,
    scale_gmem: Any,
    channel_gmem: Any,
    *refs: Any,
    problem: _Problem,
    config: Config,
    halves: int,
    grid: tuple[int, int, int],
    x_smem: Any,
    y_smem: Any,
    w_smem: Any,
    scale_smem: Any,
    token_smem: Any,
    full: Any,
    free: Any,
    residual_full: Any = None,
) -> None:
    """One CTA: the roles of its warpgroups."""
    optional = list(refs)
    x_scale_gmem = optional.pop(0) if problem.has_x_scale else None
    bias_gmem = optional.pop(0) if problem.has_bias else None
    residual_gmem = optional.pop(0) if problem.has_residual else None
    (y_gmem,) = optional
    m_tiles, n_tiles, clusters = grid
    tile_m, tile_n, stages = config.tile_m, config.tile_n, config.stages
    warpgroups, multicast, split_k = config.warpgroups, config.multicast, config.split_k
    store_m, rows_out = y_smem.shape[2:]
    x_rows, x_tiles = x_smem
    groups = problem.groups
    wg = lax.axis_index("wg")
    peer = lax.axis_index("peer")
    # Parts of K are equal: beyond the end TMA fills with zeros.
    k_tiles, buffers = config.k_tiles, config.buffers
    steps = -(-(problem.k // layouts.TILE_K) // (split_k * k_tiles))
    first_step = peer * steps if split_k > 1 else 0
    device.init_barriers(free, 4 * warpgroups * multicast, cluster=multicast > 1)

    def tiles(visit: Any, carry: Any) -> Any:
        """Fold ``visit(m_start, n_start, carry)`` over this CTA's tiles."""
        cluster = lax.axis_index("cluster")

        def step(i: jax.Array, carry: Any) -> Any:
            tile = cluster + i * clusters
            m_tile, n_tile = plgpu.planar_snake(tile, (m_tiles, n_tiles), 0, min(config.band, m_tiles))
            n_cta = n_tile * multicast + (peer if multicast > 1 else 0)
            return visit(m_tile * tile_m, n_cta * tile_n, carry)

        count = lax.div(m_tiles * n_tiles - cluster + clusters - 1, jnp.int32(clusters))
        return lax.fori_loop(0, count, step, carry)

    def advance(slot: jax.Array, parity: jax.Array) -> tuple[jax.Array, jax.Array]:
        wrapped = slot == stages - 1
        return jnp.where(wrapped, 0, slot + 1), jnp.where(wrapped, 1 - parity, parity)

    def feed() -> None:
        def tile(m_start: jax.Array, n_start: jax.Array, carry: Any) -> Any:
            def step(i: jax.Array, carry: Any) -> Any:
                slot, parity = carry
                device.wait(free, slot, parity)
                k_tile = (first_step + i) * k_tiles
                barrier = full.at[slot]
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m_start, tile_m), pl.ds(k_tile * halves, k_tiles * halves)],
                    jax_compat.transpose_ref(x_rows.at[slot], (1, 0, 2)),
                    barrier,
                    collective_axes="peer" if multicast > 1 else None,
                )
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[pl.ds(n_start // layouts.TILE_N, warpgroups), pl.ds(k_tile, k_tiles)],
                    w_smem.at[slot],
                    barrier,
                )
                plgpu.copy_gmem_to_smem(
                    scale_gmem.at[pl.ds(k_tile * groups, k_tiles * groups), pl.ds(n_start, tile_n)],
                    scale_smem.at[slot],
                    barrier,
                )
                return advance(slot, parity)

            return lax.fori_loop(0, steps, step, carry)

        # A barrier's phase before its first has parity 1, and counts as completed.
        carry = tiles(tile, (jnp.int32(0), jnp.int32(1)))
        if multicast > 1:
            # The other CTA may still arrive on this one's barriers: stay until it has.
            def drain(_: jax.Array, carry: Any) -> Any:
                device.wait(free, *carry)
                return advance(*carry)

            lax.fori_loop(0, stages, drain, carry)

    def compute() -> None:
        if config.skew:

            @pl.when(wg == 1)
            def _() -> None:
                device.sleep(config.skew)

        rows_of_wg = pl.ds(wg * layouts.TILE_N, layouts.TILE_N)

        def load(slot: jax.Array, tile: int, shared: jax.Array | None = None) -> jax.Array:
            scale = scale_smem.at[slot, pl.ds(tile * groups, groups), rows_of_wg] if problem.scale_in_table else None
            return device.load_weights(
                w_smem.at[slot, wg, tile], scale, None if shared is None else (shared, tile * groups)
            )

        def fetch(slot: jax.Array) -> jax.Array:
            """Await a step's operands and read its (first) weight tile."""
            plgpu.barrier_wait(full.at[slot])
            return load(slot, 0)

        def multiply(
            weight: jax.Array, slot: jax.Array, acc_ref: Any, *, tile: int = 0, half: int | None = None
        ) -> None:
            """Dequantize a tile (or half of it), issue its WGMMAs and await nothing."""
            columns = layouts.TILE_K // halves
            for i in range(halves) if half is None else (half,):
                part = slice(i * columns, (i + 1) * columns)
                x_part = jax_compat.transpose_ref(x_tiles.at[slot, tile * halves + i])
                plgpu.wgmma(acc_ref, device.operand(weight, problem.values, part), x_part)

        def release(slot: jax.Array) -> None:
            device.arrive(free, slot, cluster_size=multicast)

        def following(slot: jax.Array) -> jax.Array:
            return jnp.where(slot == stages - 1, 0, slot + 1)

        ahead = min(config.ahead, steps)

        def run(
            weights: tuple[jax.Array, ...], slot: jax.Array, count: int, acc_ref: Any, *, last: bool
        ) -> tuple[tuple[jax.Array, ...], jax.Array]:
            """``count`` steps: each is dequantized while the tensor cores have the one before it.

            ``weights`` are the ``ahead`` next tiles. The compiler serializes WGMMAs that are in
            flight at a loop's end, so none is.
            """
            previous, fetched = slot, slot
            for _ in range(ahead):
                fetched = following(fetched)
            for i in range(count):
                multiply(weights[0], slot, acc_ref)
                if i > 0:
                    plgpu.wgmma_wait(halves)
                    release(previous)
                previous, slot = slot, following(slot)
                weights = weights[1:]
                if not last or i < count - ahead:
                    weights = (*weights, fetch(fetched))
                    fetched = following(fetched)
            plgpu.wgmma_wait(0)
            release(previous)
            return weights, slot

        def overlapped(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            """(sum over all steps, next slot)."""

            def scope(acc_ref: Any) -> tuple[jax.Array, jax.Array]:
                weights, fetched = [], slot
                for _ in range(ahead):
                    weights.append(fetch(fetched))
                    fetched = following(fetched)
                carry = lax.fori_loop(
                    0,
                    (steps - ahead) // UNROLL,
                    lambda _, carry: run(carry[0], carry[1], UNROLL, acc_ref, last=False),
                    (tuple(weights), slot),
                )
                _, after = run(carry[0], carry[1], (steps - ahead) % UNROLL + ahead, acc_ref, last=True)
                return acc_ref[...], after

            return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, tile_m), jnp.float32))

        def batched(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            """As ``overlapped``, one step of several tiles at a time."""

            def scope(acc_ref: Any) -> tuple[jax.Array, jax.Array]:
                def step(_: Any, slot: jax.Array) -> jax.Array:
                    plgpu.barrier_wait(full.at[slot])
                    shared = None
                    if problem.scale_in_table and k_tiles * groups == 4:
                        shared = device.share_tables(scale_smem.at[slot, :, rows_of_wg])
                    weights = [load(slot, tile, shared) for tile in range(k_tiles)]
                    for tile in range(k_tiles):
                        multiply(weights[tile], slot, acc_ref, tile=tile)
                        if tile:
                            plgpu.wgmma_wait(halves)
                    plgpu.wgmma_wait(0)
                    release(slot)
                    return following(slot)

                after = lax.fori_loop(0, steps, step, slot)
                return acc_ref[...], after

            return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, tile_m), jnp.float32))

        def promoted(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            """As ``overlapped``, but the float32 sum of the (scaled) sums of ``config.promote`` steps."""
            by_half = problem.groups == 2 and not problem.scale_in_table

            def group_scale(slot: jax.Array, half: int) -> jax.Array | None:
                if problem.scale_in_table:
                    return None
                return device.load_group_scale(scale_smem.at[slot, half, rows_of_wg])

            def block(carry: Any, count: int, *, last: bool = False) -> Any:
                weight, slot, total = carry

                def first_half(acc_ref: Any) -> jax.Array:
                    multiply(weight, slot, acc_ref, half=0)
                    scale = group_scale(slot, 0)
                    return device.add_to_sum(total, acc_ref[...], scale)

                def scope(acc_ref: Any) -> Any:
                    inner, current, previous = weight, slot, slot
                    for i in range(count):
                        multiply(inner, current, acc_ref, half=1 if by_half else None)
                        if i > 0:
                            plgpu.wgmma_wait(halves)
                            release(previous)
                        previous, current = current, following(current)
                        if not last or i < count - 1:
                            inner = fetch(current)
                    scale = group_scale(previous, int(by_half))
                    acc = acc_ref[...]
                    release(previous)
                    return inner, current, device.add_to_sum(total, acc, scale)

                accumulator = plgpu.WGMMAAccumulatorRef((layouts.TILE_N, tile_m), jnp.float32)
                if by_half:
                    total = pl.run_scoped(first_half, accumulator)
                return pl.run_scoped(scope, accumulator)

            count = config.promote
            blocks = (steps - 1) // count
            carry = fetch(slot), slot, device.zero_sum(tile_m)
            carry = lax.fori_loop(0, blocks, lambda _, carry: block(carry, count), carry)
            _, slot, total = block(carry, steps - blocks * count, last=True)
            return device.sum_to_accumulator(total), slot

        def tile(m_start: jax.Array, n_start: jax.Array, slot: jax.Array) -> jax.Array:
            rows = n_start + wg * layouts.TILE_N
            columns_out = pl.multiple_of(rows // 2 if problem.silu_mul else rows, rows_out)
            channel = device.load_rows(channel_gmem, rows)
            bias = device.load_rows(bias_gmem, rows) if problem.has_bias else None
            tokens = device.load_tokens(x_scale_gmem, m_start, tile_m) if problem.has_x_scale else None
            stores = tile_m // store_m

            def out_slice(ref: Any, i: int) -> Any:
                return ref.at[pl.ds(m_start + i * store_m, store_m), pl.ds(columns_out, rows_out)]

            def fetch_residual(i: int) -> None:
                plgpu.copy_gmem_to_smem(
                    out_slice(residual_gmem, i),
                    y_smem.at[wg, i % buffers],
                    residual_full.at[buffers * wg + i % buffers],
                )

            if problem.has_residual:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i in range(min(buffers, stores)):
                    fetch_residual(i)

            if config.promote:
                acc, slot = promoted(slot)
            else:
                acc, slot = overlapped(slot) if k_tiles == 1 else batched(slot)

            def finish(acc: jax.Array) -> None:
                if tokens is not None:
                    token_smem[wg] = tokens
                for i in range(stores):
                    # The same fence makes the tokens' scales visible the first time.
                    if problem.has_residual:
                        plgpu.barrier_wait(residual_full.at[buffers * wg + i % buffers])
                        if i == 0:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    elif i == 0 or i >= buffers:
                        plgpu.wait_smem_to_gmem(buffers - 1 if i else 0, wait_read_only=True)
                    part = slice(i * store_m, (i + 1) * store_m)
                    device.store_outputs(
                        acc[:, part] if stores > 1 else acc,
                        channel,
                        bias,
                        token_smem.at[wg, part] if tokens is not None else None,
                        y_smem.at[wg, i % buffers],
                        silu_mul=problem.silu_mul,
                        add_residual=problem.has_residual,
                    )
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[wg, i % buffers], out_slice(y_gmem, i))
                    if problem.has_residual and i + buffers < stores:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        fetch_residual(i + buffers)

            if split_k == 1:
                finish(acc)
                return slot
            # The ring is the mailbox, so first every warpgroup of the cluster must be done with it.
            device.cluster_barrier()
            ring = w_smem.reshape(stages * warpgroups * k_tiles * 1024)
            size = layouts.TILE_N * tile_m

            @pl.when(peer > 0)
            def _() -> None:
                device.send_partial(acc, ring.at[pl.ds(((peer - 1) * warpgroups + wg) * size, size)])

            device.cluster_barrier()

            @pl.when(peer == 0)
            def _() -> None:
                total = acc
                for i in range(split_k - 1):
                    total = device.add_partial(total, ring.at[pl.ds((i * warpgroups + wg) * size, size)])
                finish(total)

            return slot

        tiles(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    registers = _registers(config)

    @pl.when(wg == warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        feed()

    @pl.when(wg < warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        compute()


def _registers(config: Config) -> tuple[int, int] | None:
    """Registers a thread of the feeding and of the computing warpgroups, where the even share is too few."""
    if config.warpgroups == 2 and config.tile_m >= 128:
        return 24, 240
    if config.warpgroups == 4 and config.tile_m > 32:
        return 24, 112
    return None
