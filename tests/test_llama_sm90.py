"""The whole model on the Hopper kernels: it lowers without a GPU, and agrees with plain XLA on one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fireq_jax import LlamaForCausalLM, ModelConfig, recipes
from fireq_jax.models import KVCache
from fireq_jax.models.parameters import parameters_of, with_parameters
from pallas_kernels import dispatch, jax_compat
from pallas_kernels.sm90 import early_start

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=256, intermediate_size=384, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128,
)  # fmt: skip
# Wide enough that matmuls of few tokens cut K.
WIDE = dataclasses.replace(CONFIG, hidden_size=2048, intermediate_size=2048, num_layers=2, num_heads=16)
CAPACITY = 256


def parts(config: ModelConfig = CONFIG) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, recipes.fireq(), implementation="mosaic_gpu"))
    return nnx.split(model)


@pytest.mark.parametrize("phase", ["prefill", "extend"])
def test_lowers_for_cuda_with_every_op_a_kernel(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    graph, state = parts()
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    if phase == "prefill":
        tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
        function = jax.jit(lambda s, t, n: nnx.merge(graph, s).prefill(t, n, CAPACITY))
        arguments = (state, tokens, lengths)
    else:
        tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        cache = jax.eval_shape(lambda: KVCache.create(CONFIG, recipes.fireq(), 2, CAPACITY))
        function = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
        arguments = (state, tokens, lengths, cache)
    module = jax.export.export(function, platforms=["cuda"])(*arguments).mlir_module()
    # Four matmuls, one attention, and what makes the matmuls' inputs (the two norms are one function);
    # a named implementation would have raised rather than fall back.
    assert module.count("stablehlo.custom_call @mosaic_gpu") >= 8


def test_norms_add_up_what_matmuls_leave_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    graph, state = parts(WIDE)
    tokens, lengths = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.create(WIDE, recipes.fireq(), 2, CAPACITY))
    function = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
    module = jax.export.export(function, platforms=["cuda"])(state, tokens, lengths, cache).mlir_module()
    calls = re.findall(r"call @(\w+)", module)
    # Both norms after attention and the second layer's first.
    assert len([name for name in calls if name.startswith("sum_norm_quantize")]) == 3


def test_attention_that_is_split_hands_o_proj_fp8_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    graph, state = parts()
    tokens, lengths = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.create(CONFIG, recipes.fireq(), 2, 4096))
    function = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
    module = jax.export.export(function, platforms=["cuda"])(state, tokens, lengths, cache).mlir_module()
    assert len(re.findall(r"call @combine_quantize", module)) == 1
    # down_proj's input is the only one left.
    assert len(re.findall(r"call @quantize_rows", module)) == 1


def test_every_kernel_of_a_step_can_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX launches a kernel so because it waits; one that did not would let the next overtake those before it."""
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)
    monkeypatch.setattr(early_start, "ENABLED", True)
    graph, state = parts(WIDE)
    # A batch that no other test has: what is traced here must not be found elsewhere.
    tokens, lengths = jax.ShapeDtypeStruct((7, 1), jnp.int32), jax.ShapeDtypeStruct((7,), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.create(WIDE, recipes.fireq(), 7, CAPACITY))
    function = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
    module = jax.export.export(function, platforms=["cuda"])(state, tokens, lengths, cache).mlir_module()
    kernels = module.count("stablehlo.custom_call @mosaic_gpu")
    assert module.count("griddepcontrol.wait") == kernels > 10
    assert module.count("mosaic_gpu.uses_pdl") == (kernels if jax_compat.JAX_VERSION >= (0, 11) else 0)


def logits_of(model: LlamaForCausalLM) -> np.ndarray:
    """Last logits of two prompts and of a token after each."""
    tokens = jax.random.randint(jax.random.key(1), (2, 96), 0, CONFIG.vocab_size)
    lengths = jnp.asarray([96, 41])
    graph, state = nnx.split(model)
    first, cache = jax.jit(lambda s, t, n: nnx.merge(graph, s).prefill(t, n, CAPACITY))(state, tokens, lengths)
    step = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
    second, _ = step(state, tokens[:, :1], jnp.ones_like(lengths), cache)
    return np.asarray(jnp.stack([first, second]))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["narrow", "wide"])
def test_kernels_are_as_near_to_float32_as_xla(config: ModelConfig) -> None:
    """Where a rounding falls the other way an FP8 number moves by 6%, so two bf16 paths differ by some 5%."""

    def model(implementation: dispatch.Implementation) -> LlamaForCausalLM:
        return LlamaForCausalLM(config, recipes.fireq(), implementation=implementation, rngs=nnx.Rngs(0))

    wide = nnx.eval_shape(lambda: LlamaForCausalLM(config, recipes.fireq(), dtype=jnp.float32, implementation="xla"))
    filled = {
        name: value.astype(jnp.float32) if isinstance(value, jax.Array) else value
        for name, value in parameters_of(model("xla")).items()
    }
    exact = logits_of(with_parameters(wide, filled))
    kernels, xla = (
        np.linalg.norm(logits_of(model(implementation)) - exact) / np.linalg.norm(exact)
        for implementation in ("mosaic_gpu", "xla")
    )
    assert 0 < kernels < 1.5 * xla < 0.2


@pytest.mark.gpu
def test_kernels_that_start_early_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit over many steps: a kernel that did not wait would read what is not there yet."""
    model = LlamaForCausalLM(WIDE, recipes.fireq(), implementation="mosaic_gpu", rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def steps(state: nnx.State, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
        def step(_: int, carry: tuple[jax.Array, jax.Array, KVCache]) -> tuple[jax.Array, jax.Array, KVCache]:
            tokens, _, cache = carry
            logits, cache = nnx.merge(graph, state).extend(tokens[:, None], jnp.ones_like(tokens), cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache

        logits = jnp.zeros((len(tokens), WIDE.vocab_size), jnp.float32)
        return jax.lax.fori_loop(0, CAPACITY - 1, step, (tokens, logits, cache))

    def run(early: bool) -> list[np.ndarray]:
        monkeypatch.setattr(early_start, "ENABLED", early)
        jax.clear_caches()
        arguments = state, jnp.arange(3, dtype=jnp.int32), KVCache.create(WIDE, recipes.fireq(), 3, CAPACITY)
        # One by one: in a CUDA graph no kernel starts early.
        program = jax.jit(steps).lower(*arguments).compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
        return [np.asarray(x) for x in jax.tree.leaves(program(*arguments))]

    for late, early in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(early.view(np.uint8), late.view(np.uint8))
    jax.clear_caches()
