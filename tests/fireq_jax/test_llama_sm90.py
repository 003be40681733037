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
from pallas_kernels import dispatch

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=256, intermediate_size=384, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128,
)  # fmt: skip
# Wide enough that matmuls of up to 512 tokens cut K.
WIDE = dataclasses.replace(CONFIG, hidden_size=2048, intermediate_size=2048, num_layers=2, num_heads=16)
CAPACITY = 256


def parts(config: ModelConfig = CONFIG) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, recipes.fireq(), implementation="mosaic_gpu"))
    return nnx.split(model)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are traced as on a Hopper GPU."""
    monkeypatch.setattr(dispatch, "_not_hopper", lambda: None)


def lowered(config: ModelConfig, batch: int, capacity: int = CAPACITY, *, prompt: int | None = None) -> str:
    """The module, lowered for CUDA, of one decode step, or of the prefill of ``prompt`` tokens."""
    graph, state = parts(config)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, prompt or 1), jnp.int32)
    if prompt is not None:
        function = jax.jit(lambda s, t, n: nnx.merge(graph, s).prefill(t, n, capacity))
        return jax.export.export(function, platforms=["cuda"])(state, tokens, lengths).mlir_module()
    cache = jax.eval_shape(lambda: KVCache.create(config, recipes.fireq(), batch, capacity))
    function = jax.jit(lambda s, t, n, c: nnx.merge(graph, s).extend(t, n, c))
    return jax.export.export(function, platforms=["cuda"])(state, tokens, lengths, cache).mlir_module()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("prompt", [128, None], ids=["prefill", "extend"])
def test_lowers_for_cuda_with_every_op_a_kernel(prompt: int | None) -> None:
    # Four matmuls, one attention, and what makes the matmuls' inputs (the two norms are one function);
    # a named implementation would have raised rather than fall back.
    assert lowered(CONFIG, 2, prompt=prompt).count("stablehlo.custom_call @mosaic_gpu") >= 8


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("prompt", [None, 24], ids=["8 tokens", "192 tokens"])
def test_norms_add_up_what_matmuls_leave_in_parts(prompt: int | None) -> None:
    calls = re.findall(r"call @(\w+)", lowered(WIDE, 8, prompt=prompt))
    # Both norms after attention and the second layer's first.
    assert len([name for name in calls if name.startswith("sum_norm_quantize")]) == 3


@pytest.mark.usefixtures("hopper")
def test_one_token_goes_through_a_layer_in_two_chains() -> None:
    calls = [re.sub(r"_\d+$", "", name) for name in re.findall(r"call @(\w+)", lowered(WIDE, 1))]
    assert calls.count("norm_matmul") == calls.count("output_mlp") == WIDE.num_layers
    assert not {"quantize_rows", "rms_norm_quantize", "sum_norm_quantize"} & set(calls)


@pytest.mark.usefixtures("hopper")
def test_attention_that_is_split_hands_o_proj_fp8_rows() -> None:
    module = lowered(CONFIG, 2, 1024)
    assert len(re.findall(r"call @combine_quantize", module)) == 1
    # down_proj's input is the only one left.
    assert len(re.findall(r"call @quantize_rows", module)) == 1


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
