"""From a warpgroup's accumulator to y: what the epilogue reads, and how y leaves for GMEM."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.sm90.matmul import epilogue as outputs
from pallas_kernels.sm90.matmul.config import STORE_BUFFERS, Problem


class Operands(NamedTuple):
    """Arrays in GMEM."""

    x: Any  # [M, K / columns, columns]; columns are one swizzled row of SMEM
    words: Any  # int32 [N / 64, K / 128, 4, 256]
    group_scale: Any  # uint8 (the bits of E4M3) or bf16 [G, N]
    channel_scale: Any  # float32 [N]
    x_scale: Any | None  # float32 [M]
    bias: Any | None  # [N or less]
    residual: Any | None  # bf16 [M, n_out]
    y: Any  # bf16 [M, n_out]


class Epilogue(NamedTuple):
    """What a warpgroup needs to finish its part of a tile."""

    token: jax.Array
    column: jax.Array
    channel_scale: jax.Array
    bias: jax.Array | None
    token_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Output:
    """One finishing warpgroup.

    Attributes:
        tile_m: tokens of a tile.
        wg: its index among those that finish.
        y: bf16 [warpgroups, STORE_BUFFERS, tokens, rows_out] in SMEM.
        tokens: float32, as int32 [warpgroups, token_slots] in SMEM.
        residual_full: barriers [warpgroups * STORE_BUFFERS].
    """

    problem: Problem
    operands: Operands
    tile_m: int
    wg: jax.Array | int
    y: Any
    tokens: Any
    residual_full: Any | None

    @property
    def _stores(self) -> int:
        return self.tile_m // self.y.shape[2]

    def _part_of(self, array: Any, epilogue: Epilogue, i: int) -> Any:
        """The i-th part (y or residual) of this warpgroup's tile in GMEM."""
        tokens = self.y.shape[2]
        rows, columns = pl.ds(epilogue.token + i * tokens, tokens), pl.ds(epilogue.column, self.problem.rows_out)
        return array.at[rows, columns]

    def _fetch_residual(self, epilogue: Epilogue, i: int) -> None:
        assert self.residual_full is not None
        buffer = i % STORE_BUFFERS
        plgpu.copy_gmem_to_smem(
            self._part_of(self.operands.residual, epilogue, i),
            self.y.at[self.wg, buffer],
            self.residual_full.at[STORE_BUFFERS * self.wg + buffer],
        )

    def begin(self, token: jax.Array, channel: jax.Array) -> Epilogue:
        """Start to read what ``finish`` will need for 64 channels of the tile that begins here."""
        operands = self.operands
        column = channel if self.problem.activation == "none" else channel // 2
        return Epilogue(
            token,
            pl.multiple_of(column, self.problem.rows_out),
            outputs.load_rows(operands.channel_scale, channel),
            None if operands.bias is None else outputs.load_rows(operands.bias, channel),
            None if operands.x_scale is None else outputs.load_tokens(operands.x_scale, token, self.tile_m),
        )

    def begin_residual(self, epilogue: Epilogue) -> None:
        """Start to read the residual, if there is one, into the buffers for y."""
        if self.operands.residual is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(min(STORE_BUFFERS, self._stores)):
                self._fetch_residual(epilogue, i)

    def finish(self, acc: jax.Array, epilogue: Epilogue) -> None:
        """Scale, activate, add, and send to GMEM, part by part."""
        operands = self.operands
        has_residual = operands.residual is not None
        if epilogue.token_scale is not None:
            self.tokens[self.wg] = epilogue.token_scale
        tokens = self.y.shape[2]
        for i in range(self._stores):
            buffer, part = i % STORE_BUFFERS, slice(i * tokens, (i + 1) * tokens)
            if has_residual:
                assert self.residual_full is not None
                plgpu.barrier_wait(self.residual_full.at[STORE_BUFFERS * self.wg + buffer])
            # The first wait is also the barrier after which the tokens' scales are there for all.
            if i == 0 or (i >= STORE_BUFFERS and not has_residual):
                plgpu.wait_smem_to_gmem(min(i, STORE_BUFFERS - 1), wait_read_only=True)
            outputs.store_outputs(
                acc[:, part] if self._stores > 1 else acc,
                epilogue.channel_scale,
                epilogue.bias,
                0 if operands.bias is None else 8 * operands.bias.dtype.itemsize,
                None if epilogue.token_scale is None else self.tokens.at[self.wg, part],
                self.y.at[self.wg, buffer],
                activation=self.problem.activation,
                add_residual=has_residual,
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.y.at[self.wg, buffer], self._part_of(operands.y, epilogue, i))
            if has_residual and i + STORE_BUFFERS < self._stores:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self._fetch_residual(epilogue, i + STORE_BUFFERS)
