"""What the warpgroups of the chain kernel do: the links one after the other, input, products, epilogue."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import arith

from pallas_kernels import layouts
from pallas_kernels.sm90.chain import barriers, epilogue, inputs, producer
from pallas_kernels.sm90.chain.schedule import CHUNK, CHUNK_K, STAGES, SUMS, TILE_M, WARPGROUPS, Link
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.common.ptx import SCALAR, const, inlined
from pallas_kernels.sm90.matmul import sums, weights
from pallas_kernels.sm90.matmul.epilogue import load_rows

X_TRANSFORMS = plgpu.TilingTransform((8, layouts.TILE_K)), plgpu.SwizzleTransform(layouts.TILE_K)
# For each thread of the producer, and of the consumers.
_REGISTERS = 24, 112


@dataclasses.dataclass(frozen=True)
class Worker:
    """One warpgroup.

    Attributes:
        links: of the chain.
        m: tokens.
        eps: of the norms.
        memory: operands and results in GMEM, by the names of ``kernel``.
        shared: the block's shared memory, by the names of ``kernel``.
        block: index of the block.
        wg: index of the warpgroup; the last is the producer.
    """

    links: tuple[Link, ...]
    m: int
    eps: float
    memory: Mapping[str, Any]
    shared: Mapping[str, Any]
    block: jax.Array
    wg: jax.Array

    def run(self) -> None:
        """Copy weights, in the last warpgroup, or compute."""
        sync.init_barriers(self._stages.full, 1, cluster=False)
        sync.init_barriers(self._stages.free, 4, cluster=False)
        producer_registers, consumer_registers = _REGISTERS

        @pl.when(self.wg == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(producer_registers, action="decrease")
            count = range(len(self.links))
            words, scales = ([self.memory[f"{name}{i}"] for i in count] for name in ("words", "group_scale"))
            producer.produce(self.links, words, scales, self._stages, self.block)

        @pl.when(self.wg < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(consumer_registers, action="increase")
            self._compute()

    def _compute(self) -> None:
        """All links, by a consumer."""
        if len(self.links) == 1:
            barriers.init_state(self.memory["state"], self.block)
        q = jnp.int32(0)
        for i, link in enumerate(self.links):
            if i > 0:
                if self.links[i - 1].gated:
                    epilogue.publish_absmax(self.shared["absmax"], self.memory[f"absmax{i - 1}"], self.block)
                barriers.grid_barrier(self.memory["state"], self.block, NUM_SMS, i - 1)
            self._make_input(i, link)
            if link.gated:
                epilogue.clear_absmax(self.shared["absmax"])
            barriers.fence_operand()
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
    def _stages(self) -> producer.Stages:
        return producer.Stages(*(self.shared[name] for name in producer.Stages._fields))

    # --- inputs -----------------------------------------------------------------------------------------

    def _make_input(self, i: int, link: Link) -> None:
        """The link's input in shared memory and its rows' scales, up to ``fence_operand``."""
        # The leader writes what all blocks compute: the last block, which has the least to multiply.
        leader = (self.block == NUM_SMS - 1).astype(jnp.int32)
        first = self._first_column(link)
        columns = link.held_chunks * CHUNK_K
        memory = self.memory
        if link.source == "rows":
            refs = {"x": memory["x"], "x_scale": memory["x_scale"]}
            self._inline_rows(refs, (first,), lambda after, refs, first: inputs.copy_rows(refs, first, columns, after))
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
                lambda _, refs, first, leader: inputs.quantize_hidden(refs, first, columns, blocks, _true(leader)),
            )
        else:
            self._inline_rows(
                self._norm_refs(i),
                (leader,),
                lambda after, refs, leader: inputs.norm_rows(refs, self.eps, _true(leader), after, written=i > 0),
            )

    def _norm_refs(self, i: int) -> dict[str, Any]:
        """What the norm of link i reads and writes in GMEM, by the names of ``inputs.norm_rows``."""
        memory = self.memory
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
        return refs

    def _inline_rows(self, refs: dict[str, Any], scalars: tuple[jax.Array, ...], emit: Any) -> None:
        """Call ``emit(after_loads, refs, *scalars)`` in device code."""
        names = (*refs, "tile", "tokens", "partials")
        shared = [self.shared[name] for name in ("tile", "tokens", "partials")]
        ref = plgpu.RefType()
        types = [*([ref] * len(refs)), plgpu.RefType(X_TRANSFORMS), ref, ref]

        @inlined(arg_types=(*types, *([SCALAR] * len(scalars))))
        def inline(_: Any, *arguments: Any) -> None:
            values = [x.registers.item() for x in arguments[len(types) :]]
            emit(barriers.emit_loads_started, dict(zip(names, arguments, strict=False)), *values)

        inline(*refs.values(), *shared, *scalars)

    # --- products ---------------------------------------------------------------------------------------

    def _multiply(self, i: int, link: Link, base: jax.Array) -> jax.Array:
        """Multiply the block's chunks of a link; this consumer has had ``base`` chunks of earlier links.

        Returns that number for the next link.
        """
        first, end = self._range(link)
        first_tile = lax.div(first, jnp.int32(link.chunks))
        first_chunk = lax.div(self._first_column(link), jnp.int32(CHUNK_K))

        def one_tile(tile: jax.Array, q: jax.Array) -> jax.Array:
            channels: dict[str, jax.Array] = {}
            if link.gated:
                for name in ("channel_scale", "bias"):
                    if f"{name}{i}" in self.memory:
                        channels[name] = load_rows(self.memory[f"{name}{i}"], tile * layouts.TILE_N)
            stop = jnp.minimum(end, (tile + 1) * link.chunks)
            own = stop - (first + self.wg + WARPGROUPS * (q - base))
            count = lax.div(jnp.maximum(own, 0) + WARPGROUPS - 1, jnp.int32(WARPGROUPS))

            def one_chunk(_: jax.Array, carry: Any) -> Any:
                q, total = carry
                chunk = lax.rem(first + self.wg + WARPGROUPS * (q - base), jnp.int32(link.chunks)) - first_chunk
                held = jnp.where(chunk < 0, chunk + link.chunks, chunk)
                return q + 1, sums.add_to_sum(total, self._chunk(link, q, held), None)

            q, total = lax.fori_loop(0, count, one_chunk, (q, sums.zero_sum(TILE_M)))
            self._finish(i, link, tile, total, channels)
            return q

        return lax.fori_loop(first_tile, lax.div(end + link.chunks - 1, jnp.int32(link.chunks)), one_tile, base)

    def _chunk(self, link: Link, q: jax.Array, held: jax.Array) -> jax.Array:
        """The product of the q-th chunk of weights with the ``held``-th chunk of the input."""
        slot, turn = lax.rem(q, jnp.int32(STAGES)), lax.div(q, jnp.int32(STAGES))
        problem, tiles = link.problem(self.m), self.shared["tile"]
        sync.wait(self._stages.full, self.wg * STAGES + slot, lax.rem(turn, jnp.int32(2)))
        packed, scales = producer.take(self._stages, self.wg, slot, CHUNK * link.groups)
        sync.arrive(self._stages.free, self.wg * STAGES + slot, cluster_size=1)
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
        """Reduce a tile's sums over the consumers, and run the epilogue in one of them: another for each tile."""
        first, end = self._range(link)
        turn = tile - lax.div(first, jnp.int32(link.chunks))
        stored = self.shared["sums"].at[lax.rem(turn, jnp.int32(SUMS))]
        sums.store_sum(total, stored.at[self.wg])
        barriers.barrier()

        @pl.when(self.wg == lax.rem(turn, jnp.int32(WARPGROUPS)))
        def _() -> None:
            whole = sums.zero_sum(TILE_M)
            for wg in range(WARPGROUPS):
                whole = sums.add_stored_sum(whole, stored.at[wg])
            if link.gated:
                refs = self.shared["tokens"], self.shared["absmax"], self.memory[f"hidden{i}"]
                bias_bits = 8 * self.memory[f"bias{i}"].dtype.itemsize if "bias" in channels else 0
                epilogue.store_hidden(whole, channels, bias_bits, *refs, tile, link.activation)
                return
            parts = self.memory[f"parts{i}"]
            part = self.block - lax.div(tile * link.chunks, jnp.int32(link.per_block))
            sums.store_partial(whole, parts, part, jnp.int32(0), tile)
            # All tiles get ``link.parts`` partials: zeros where fewer blocks share a tile.
            for missing in range(1, link.parts):

                @pl.when((end >= (tile + 1) * link.chunks) & (part < missing))
                def _(missing: int = missing) -> None:
                    epilogue.store_zeros(parts, jnp.int32(missing), tile)


def _true(flag: Any) -> Any:
    """A 32-bit flag as a condition."""
    return arith.cmpi(arith.CmpIPredicate.ne, flag, const(0))
