"""A chain of matmuls for few tokens as one kernel, whose thread blocks stay for all of them.

One token's way through a layer is four matmuls, and between any two of them a pass over a row that takes longer to
start than to run. Here one block on each multiprocessor stays from one matmul (a link of the chain) to the next:
after each, the blocks meet at a barrier of the grid, every block makes the next link's input for itself, from the L2
cache into shared memory, and multiplies on.

All blocks must run at once, so two chains must not run on a device at the same time. XLA runs a device's kernels one
after the other, and a model's chains depend on each other.

A block has a producer warpgroup (``producer``), each warp of which copies packed weights for one of four consumers
(``mainloop``). Which block computes what is in ``schedule``. A tile whose K several blocks share is left as split-K
partials, which the next norm reduces.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, layouts
from pallas_kernels.sm90.chain import inputs
from pallas_kernels.sm90.chain.mainloop import X_TRANSFORMS, Worker
from pallas_kernels.sm90.chain.schedule import CHUNK, STAGES, SUMS, TILE_M, WARPGROUPS, Link, held_tiles
from pallas_kernels.sm90.common.hardware import NUM_SMS


def outputs(links: tuple[Link, ...], m: int, *, has_parts: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes; names end in their link's index.

    Args:
        links: of the chain.
        m: tokens.
        has_parts: whether the first link's norm reduces split-K partials.
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

    Operands are, for link i, ``words{i}``, ``group_scale{i}``, ``channel_scale{i}`` and perhaps ``bias{i}`` (the last
    link's is for the kernel that reduces its partials); for a norm ``weight{i}``; for the first link ``x`` and
    ``x_scale`` (rows), or ``residual`` and perhaps ``parts``, ``parts_channel_scale``, ``parts_x_scale`` and
    ``parts_bias`` (norm); ``residual`` for the first norm. A single link needs no barrier and initializes the
    ``state`` of one; several links take such a ``state``, and use it up.
    """
    out = outputs(links, m, has_parts="parts" in operands)
    groups = CHUNK * max(link.groups for link in links)
    scratch = {
        "tile": plgpu.SMEM((held_tiles(links), TILE_M, layouts.TILE_K), formats.E4M3, transforms=X_TRANSFORMS),
        "words": plgpu.SMEM((WARPGROUPS, STAGES, CHUNK, 4, 256), jnp.int32),
        "scales": plgpu.SMEM((WARPGROUPS, STAGES, groups, layouts.TILE_N), jnp.uint8),
        "full": plgpu.SMEM((WARPGROUPS * STAGES, 2), jnp.int32),
        "free": plgpu.SMEM((WARPGROUPS * STAGES, 2), jnp.int32),
        "sums": plgpu.SMEM((SUMS, WARPGROUPS, layouts.TILE_N * TILE_M), jnp.int32),
        "tokens": plgpu.SMEM((TILE_M,), jnp.int32),
        "absmax": plgpu.SMEM((TILE_M,), jnp.int32),
        "partials": plgpu.SMEM((inputs.UNITS * 2 * inputs.WARPS,), jnp.float32),
    }

    def body(*refs: Any, **shared: Any) -> None:
        memory = dict(zip((*operands, *out), refs, strict=True))
        Worker(links, m, eps, memory, shared, lax.axis_index("block"), lax.axis_index("wg")).run()

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
