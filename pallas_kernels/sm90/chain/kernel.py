"""A chain of matmuls for few tokens as one kernel, on blocks that stay for all of them.

One token's way through a layer is four matmuls, and between any two of them a pass over a row that
takes longer to start than to run. Here one block on each multiprocessor stays from one matmul
(a link of the chain) to the next: blocks meet at a barrier of the grid, every block makes the next
link's input for itself, from the L2 cache into shared memory, and the multiplication goes on.

All blocks must run at once, so two chains must not run on a device at the same time. XLA runs a
device's kernels one after the other, and a model's chains depend on each other.

A block has a warpgroup that copies, each of its warps the packed weights of one of the four that
compute: their chunks, a tile's sum over the four, and who computes what are in ``schedule``. A tile
whose K several blocks share is left in parts (``SplitSum``), which the next norm adds up.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import arith

from pallas_kernels import formats, layouts
from pallas_kernels.sm90.chain import device, rows
from pallas_kernels.sm90.chain.schedule import (
    AHEAD,
    CHUNK,
    CHUNK_K,
    SUMS,
    TILE_M,
    WARPGROUPS,
    Link,
    held_tiles,
)
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.common.ptx import SCALAR, const, inlined
from pallas_kernels.sm90.matmul import epilogue, weights

# A thread's of the feeding warpgroup and of the computing ones.
_REGISTERS = 24, 112
_X_TRANSFORMS = plgpu.TilingTransform((8, layouts.TILE_K)), plgpu.SwizzleTransform(layouts.TILE_K)


def outputs(links: tuple[Link, ...], m: int, *, has_parts: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes; names end in their link's index.

    Args:
        links: of the chain.
        m: tokens.
        has_parts: whether the first link's norm adds parts up.
    """
    result = {}
    for i, link in enumerate(links):
        if link.gated:
            result[f"hidden{i}"] = jax.ShapeDtypeStruct((m, link.n // 2), jnp.bfloat16)
            result[f"absmax{i}"] = jax.ShapeDtypeStruct((NUM_SMS, TILE_M), jnp.int32)
        else:
            result[f"parts{i}"] = jax.ShapeDtypeStruct((link.parts, m, link.n), jnp.float32)
        if link.source != "rows":
            result[f"scale{i}"] = jax.ShapeDtypeStruct((m,), jnp.float32)
        if link.source == "norm" and (i > 0 or has_parts):
            result[f"x{i}"] = jax.ShapeDtypeStruct((m, link.k), jnp.bfloat16)
    if len(links) == 1:
        result["state"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    return result


def kernel(links: tuple[Link, ...], m: int, eps: float, operands: tuple[str, ...]) -> Any:
    """The Pallas call: operands by their names, results in the order of ``outputs``.

    Operands are, for link i, ``words{i}``, ``group_scale{i}``, ``channel_scale{i}`` and maybe ``bias{i}`` (of the
    last link whoever adds its parts up needs that instead); for a norm ``weight{i}``; for the first link ``x``
    and ``x_scale`` (rows), or ``residual`` and maybe ``parts``, ``parts_channel_scale``, ``parts_x_scale`` and
    ``parts_bias`` (norm); ``residual`` for the first norm. A single link
    needs no barrier and makes the ``state`` of one; several links want such a ``state``, and use it up.
    """
    out = outputs(links, m, has_parts="parts" in operands)
    groups = CHUNK * max(link.groups for link in links)
    scratch = {
        "tile": plgpu.SMEM((held_tiles(links), TILE_M, layouts.TILE_K), formats.E4M3, transforms=_X_TRANSFORMS),
        "words": plgpu.SMEM((WARPGROUPS, AHEAD, CHUNK, 4, 256), jnp.int32),
        "scales": plgpu.SMEM((WARPGROUPS, AHEAD, groups, layouts.TILE_N), jnp.uint8),
        "full": plgpu.SMEM((WARPGROUPS * AHEAD, 2), jnp.int32),
        "free": plgpu.SMEM((WARPGROUPS * AHEAD, 2), jnp.int32),
        "sums": plgpu.SMEM((SUMS, WARPGROUPS, layouts.TILE_N * TILE_M), jnp.int32),
        "tokens": plgpu.SMEM((TILE_M,), jnp.int32),
        "absmax": plgpu.SMEM((TILE_M,), jnp.int32),
        "partials": plgpu.SMEM((rows.UNITS * 2 * rows.WARPS,), jnp.float32),
    }

    def body(*refs: Any, **shared: Any) -> None:
        memory = dict(zip((*operands, *out), refs, strict=True))
        _Worker(links, m, eps, memory, shared, lax.axis_index("block"), lax.axis_index("wg")).run()

    return plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        grid=(NUM_SMS,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="matmul_chain",
    )


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One warpgroup."""

    links: tuple[Link, ...]
    m: int
    eps: float
    memory: Mapping[str, Any]
    shared: Mapping[str, Any]
    block: jax.Array
    wg: jax.Array

    def run(self) -> None:
        """All of it: the last warpgroup feeds the others."""
        sync.init_barriers(self._ring.full, 1, cluster=False)
        sync.init_barriers(self._ring.free, 4, cluster=False)
        feeding, computing = _REGISTERS

        @pl.when(self.wg == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(feeding, action="decrease")
            count = range(len(self.links))
            words, scales = ([self.memory[f"{name}{i}"] for i in count] for name in ("words", "group_scale"))
            device.feed(self.links, words, scales, self._ring, self.block)

        @pl.when(self.wg < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(computing, action="increase")
            self._compute()

    def _compute(self) -> None:
        """All links."""
        if len(self.links) == 1:
            device.init_state(self.memory["state"], self.block)
        q = jnp.int32(0)
        for i, link in enumerate(self.links):
            if i > 0:
                if self.links[i - 1].gated:
                    device.publish(self.shared["absmax"], self.memory[f"absmax{i - 1}"], self.block)
                device.grid_barrier(self.memory["state"], self.block, NUM_SMS, i - 1)
            self._make_input(i, link)
            if link.gated:
                device.clear(self.shared["absmax"])
            device.fence_operand()
            q = self._multiply(i, link, q)

    # --- the schedule -----------------------------------------------------------------------------------

    def _range(self, link: Link) -> tuple[jax.Array, jax.Array]:
        """The block's first chunk and the one after its last."""
        first = jnp.minimum(self.block * link.per_block, link.total)
        return first, jnp.minimum(first + link.per_block, link.total)

    def _first_column(self, link: Link) -> jax.Array:
        """The first of the input's columns that the block holds."""
        if link.whole_rows:
            return jnp.int32(0)
        return lax.rem(self._range(link)[0], jnp.int32(link.chunks)) * CHUNK_K

    @property
    def _ring(self) -> device.Ring:
        return device.Ring(*(self.shared[name] for name in device.Ring._fields))

    # --- inputs -----------------------------------------------------------------------------------------

    def _make_input(self, i: int, link: Link) -> None:
        """The link's input in shared memory and its rows' scales, up to ``fence_operand``."""
        # The last block, which has less to multiply than the others, or nothing.
        leader = (self.block == NUM_SMS - 1).astype(jnp.int32)
        first = self._first_column(link)
        columns = link.held_chunks * CHUNK_K
        memory = self.memory
        if link.source == "rows":
            refs = {"x": memory["x"], "x_scale": memory["x_scale"]}
            self._inline_rows(refs, (first,), lambda after, refs, first: rows.copy_rows(refs, first, columns, after))
        elif link.source == "hidden":
            blocks = self.links[i - 1].blocks
            refs = {
                "hidden": memory[f"hidden{i - 1}"],
                "absmax": memory[f"absmax{i - 1}"],
                "scale": memory[f"scale{i}"],
            }
            self._inline_rows(
                refs,
                (first, leader),
                lambda _, refs, first, leader: rows.quantize_hidden(refs, first, columns, blocks, _true(leader)),
            )
        else:
            refs = {"weight": memory[f"weight{i}"], "scale": memory[f"scale{i}"]}
            before = [f"x{j}" for j in range(i) if f"x{j}" in memory]
            refs["residual"] = memory[before[-1]] if before else memory["residual"]
            if i > 0:
                refs |= {"parts": memory[f"parts{i - 1}"], "channel_scale": memory[f"channel_scale{i - 1}"]}
                refs["x_scale"] = memory[f"scale{i - 1}"] if f"scale{i - 1}" in memory else memory["x_scale"]
                if f"bias{i - 1}" in memory:
                    refs["bias"] = memory[f"bias{i - 1}"]
            elif "parts" in memory:
                names = ("channel_scale", "x_scale", "bias")
                refs |= {name: memory[f"parts_{name}"] for name in names if f"parts_{name}" in memory}
                refs["parts"] = memory["parts"]
            if "parts" in refs:
                refs["x"] = memory[f"x{i}"]
            self._inline_rows(
                refs,
                (leader,),
                lambda after, refs, leader: rows.norm_rows(refs, self.eps, _true(leader), after, written=i > 0),
            )

    def _inline_rows(self, refs: dict[str, Any], scalars: tuple[jax.Array, ...], emit: Any) -> None:
        """Call ``emit(after_loads, refs, *scalars)`` in device code."""
        names = (*refs, "tile", "tokens", "partials")
        shared = [self.shared[name] for name in ("tile", "tokens", "partials")]
        ref = plgpu.RefType()
        types = [*([ref] * len(refs)), plgpu.RefType(_X_TRANSFORMS), ref, ref]

        @inlined(arg_types=(*types, *([SCALAR] * len(scalars))))
        def inline(_: Any, *arguments: Any) -> None:
            values = [x.registers.item() for x in arguments[len(types) :]]
            emit(device.emit_loads_started, dict(zip(names, arguments, strict=False)), *values)

        inline(*refs.values(), *shared, *scalars)

    # --- products ---------------------------------------------------------------------------------------

    def _multiply(self, i: int, link: Link, base: jax.Array) -> jax.Array:
        """The block's chunks of a link; ``base`` chunks of earlier links were this warpgroup's."""
        first, end = self._range(link)
        first_tile = lax.div(first, jnp.int32(link.chunks))
        first_chunk = lax.div(self._first_column(link), jnp.int32(CHUNK_K))

        def one_tile(tile: jax.Array, q: jax.Array) -> jax.Array:
            channels: dict[str, jax.Array] = {}
            if link.gated:
                for name in ("channel_scale", "bias"):
                    if f"{name}{i}" in self.memory:
                        channels[name] = epilogue.load_rows(self.memory[f"{name}{i}"], tile * layouts.TILE_N)
            stop = jnp.minimum(end, (tile + 1) * link.chunks)
            own = stop - (first + self.wg + WARPGROUPS * (q - base))
            count = lax.div(jnp.maximum(own, 0) + WARPGROUPS - 1, jnp.int32(WARPGROUPS))

            def one_chunk(_: jax.Array, carry: Any) -> Any:
                q, total = carry
                chunk = lax.rem(first + self.wg + WARPGROUPS * (q - base), jnp.int32(link.chunks)) - first_chunk
                held = jnp.where(chunk < 0, chunk + link.chunks, chunk)
                return q + 1, epilogue.add_to_sum(total, self._chunk(link, q, held), None)

            q, total = lax.fori_loop(0, count, one_chunk, (q, epilogue.zero_sum(TILE_M)))
            self._finish(i, link, tile, total, channels)
            return q

        return lax.fori_loop(first_tile, lax.div(end + link.chunks - 1, jnp.int32(link.chunks)), one_tile, base)

    def _chunk(self, link: Link, q: jax.Array, held: jax.Array) -> jax.Array:
        """The product of the q-th chunk of weights with the ``held``-th chunk of the input."""
        slot, turn = lax.rem(q, jnp.int32(AHEAD)), lax.div(q, jnp.int32(AHEAD))
        problem, tiles = link.problem(self.m), self.shared["tile"]
        sync.wait(self._ring.full, self.wg * AHEAD + slot, lax.rem(turn, jnp.int32(2)))
        packed, scales = device.take(self._ring, self.wg, slot, CHUNK * link.groups)
        sync.arrive(self._ring.free, self.wg * AHEAD + slot, cluster_size=1)
        sets = tuple(weights.build_tables(four, link.codebook) for four in scales)
        tables = weights.tables_by_tile(sets, CHUNK, link.groups)

        def all_tiles(acc_ref: Any) -> jax.Array:
            for t in range(CHUNK):
                weights.multiply(problem, packed[t], tables[t], lambda _, t=t: tiles.at[held * CHUNK + t], acc_ref)
                if t > 0:
                    plgpu.wgmma_wait(1)
            return acc_ref[...]

        return pl.run_scoped(all_tiles, plgpu.WGMMAAccumulatorRef((layouts.TILE_N, TILE_M), jnp.float32))

    def _finish(self, i: int, link: Link, tile: jax.Array, total: jax.Array, channels: dict[str, jax.Array]) -> None:
        """Add up the warpgroups' sums of a tile, and send it on its way in one of them."""
        first, end = self._range(link)
        turn = tile - lax.div(first, jnp.int32(link.chunks))
        sums = self.shared["sums"].at[lax.rem(turn, jnp.int32(SUMS))]
        epilogue.leave_sum(total, sums.at[self.wg])
        device.barrier()

        @pl.when(self.wg == lax.rem(turn, jnp.int32(WARPGROUPS)))
        def _() -> None:
            whole = epilogue.zero_sum(TILE_M)
            for wg in range(WARPGROUPS):
                whole = epilogue.add_left_sum(whole, sums.at[wg])
            if link.gated:
                refs = self.shared["tokens"], self.shared["absmax"], self.memory[f"hidden{i}"]
                bias_bits = 8 * self.memory[f"bias{i}"].dtype.itemsize if "bias" in channels else 0
                device.store_hidden(whole, channels, bias_bits, *refs, tile, link.activation)
                return
            parts = self.memory[f"parts{i}"]
            part = self.block - lax.div(tile * link.chunks, jnp.int32(link.per_block))
            epilogue.store_partial(whole, parts, part, jnp.int32(0), tile)
            # A tile in fewer parts than others has zeros for the rest.
            for missing in range(1, link.parts):

                @pl.when((end >= (tile + 1) * link.chunks) & (part < missing))
                def _(missing: int = missing) -> None:
                    device.store_zeros(parts, jnp.int32(missing), tile)


def _true(flag: Any) -> Any:
    """A 32-bit flag as a condition."""
    return arith.cmpi(arith.CmpIPredicate.ne, flag, const(0))
