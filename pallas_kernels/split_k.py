"""Split-K partials: a matmul's result before the sum over the parts of K that its thread blocks computed.

    y[m, n] = activation(x_scale[m] * channel_scale[n] * sum_p parts[p, m, n] + bias[n]) + residual[m, n]

With few tokens several thread blocks share a tile's K. A kernel that only reduced their partial sums would take
as long as one that reads the result anyway, so ``row_quantize`` and ``rope_quantize`` reduce them as they load.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.matmul_epilogue import Activation, epilogue

MAX_PARTS = 8  # largest split_k: the kernels that reduce a row load all of its parts before the first sum


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts", "channel_scale", "x_scale", "bias", "residual"),
    meta_fields=("rows", "n", "activation"),
)
@dataclasses.dataclass(frozen=True)
class SplitKPartials:
    """The operands of y, left unreduced by ``matmul.unreduced_matmul``.

    Attributes:
        parts: float32 [P, M, N], unscaled partial sums, each over a part of K; M is the product of ``rows``.
        channel_scale: float32 [N].
        x_scale: float32 [M], or None.
        bias: [n], or None.
        residual: [M, n_out], added last, or None.
        rows: leading axes of y.
        n: output channels before the activation; N is n rounded up to whole tiles.
        activation: as in ``matmul``; n_out is n, or n / 2 where a gate is activated.
    """

    parts: Float[Array, "P M N"]
    channel_scale: Float[Array, " N"]
    x_scale: Float[Array, " M"] | None
    bias: Float[Array, " n"] | None
    residual: Float[Array, "M n_out"] | None
    rows: tuple[int, ...]
    n: int
    activation: Activation

    def reduce(self) -> Float[Array, "*rows n_out"]:
        """y in bfloat16, reduced by XLA."""
        # A chain of additions, which XLA fuses with what follows; a reduction it might not.
        parts = (self.parts[i, :, : self.n] for i in range(self.parts.shape[0]))
        y = functools.reduce(jnp.add, parts) * self.channel_scale[: self.n]
        if self.x_scale is not None:
            y = y * self.x_scale[:, None]
        y = epilogue(y, self.bias, self.activation, self.residual)
        return y.astype(jnp.bfloat16).reshape(*self.rows, -1)


def reduced(x: Array | SplitKPartials) -> Array:
    """x, or y of split-K partials."""
    return x.reduce() if isinstance(x, SplitKPartials) else x
