"""Mixtures of experts: routing, the sum of experts, quantized weights, configs that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_families import family_fields
from tiny_llama import write_folder

from fireq_jax import AutoModelForCausalLM, recipes
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import ExpertsConfig, ModelConfig
from fireq_jax.models.experts import Experts, Router
from fireq_jax.models.layers import MLP, LayerOptions
from fireq_jax.models.parameters import abstract, parameters_of, quantize_linear, with_parameters
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels.quantized_tensor import QuantizedTensor

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=24, intermediate_size=20, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    experts=ExpertsConfig(5, 2),
)  # fmt: skip


def experts_of(config: ModelConfig = CONFIG, quantization: QuantizationConfig | None = None) -> Experts:
    """Experts with random weights, biases included."""
    quantization = quantization or recipes.none()
    module = abstract(
        lambda: Experts("layers.0.mlp", config, LayerOptions(quantization, jnp.float32, "xla", nnx.Rngs(0)))
    )
    random = np.random.default_rng(1)

    def made(value):
        if not isinstance(value, QuantizedTensor):
            return jnp.asarray(random.standard_normal(value.shape) * 0.5, jnp.float32)
        weight = random.standard_normal((len(value.channel_scale), *value.shape)) * 0.5
        return quantize_linear(jnp.asarray(weight, jnp.float32), quantization)

    return with_parameters(module, {name: made(value) for name, value in parameters_of(module).items()})


def rows_of(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (*shape, CONFIG.hidden_size))


def one_expert(module: Experts, index: int) -> MLP:
    graph, state = nnx.split(module.experts)
    return nnx.merge(graph, jax.tree.map(lambda stack: stack[index], state))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_router_weighs_the_likeliest_experts(normalized, bias):
    random = np.random.default_rng(0)
    router = Router(6, ExpertsConfig(5, 3, normalized=normalized, router_bias=bias), nnx.Rngs(0))
    weight, x = random.standard_normal((5, 6)).astype(np.float32), random.standard_normal((2, 7, 6)).astype(np.float32)
    router.weight.set_value(jnp.asarray(weight))
    shift = random.standard_normal(5).astype(np.float32) if bias else np.zeros(5)
    if router.bias is not None:
        router.bias.set_value(jnp.asarray(shift))
    found = np.asarray(router(jnp.asarray(x)))
    for token, row in zip(x.reshape(-1, 6), found.reshape(-1, 5), strict=True):
        odds = np.exp(weight @ token + shift)
        chosen = np.argsort(odds)[-3:]
        expected = np.zeros(5)
        expected[chosen] = odds[chosen] / (odds[chosen].sum() if normalized else odds.sum())
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", ["silu", "clamped_silu"])
def test_each_token_gets_the_sum_of_its_own_experts(activation):
    config = dataclasses.replace(CONFIG, activation=activation, mlp_bias=True)
    module = experts_of(config)
    x, residual = 3 * rows_of(2, 6), rows_of(2, 6)
    weights = np.asarray(module.router(x))
    assert {np.count_nonzero(row) for row in weights.reshape(-1, 5)} == {2}
    outputs = [np.asarray(one_expert(module, expert)(x)) for expert in range(5)]
    expected = np.array(residual)
    for place in np.ndindex(2, 6):
        for expert in np.flatnonzero(weights[place]):
            expected[place] += weights[place][expert] * outputs[expert][place]
    found = module(x, residual)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    # Alone, a token has fewer choices than there are experts; those that it leaves out are not visited.
    alone = module(x[:1, :1], residual[:1, :1])
    np.testing.assert_allclose(alone, found[:1, :1], rtol=2e-5, atol=2e-5)


def test_clamped_gates_reach_their_limits():
    module = one_expert(experts_of(dataclasses.replace(CONFIG, activation="clamped_silu")), 0)
    seen = {}
    module(100 * rows_of(8), tap=seen.__setitem__)
    assert float(jnp.max(seen["down_input"])) == pytest.approx(7 * 8, rel=1e-4)
    assert float(jnp.min(seen["down_input"])) == pytest.approx(7 * -6, rel=1e-4)


def test_what_an_expert_makes_of_tokens_of_others_does_not_matter():
    module = experts_of()
    x = rows_of(1, 6)
    weights = np.array(module.router.weight.get_value())
    weights[3] = 0
    module.router.weight.set_value(jnp.asarray(weights - 100 * np.eye(5)[3][:, None] * np.asarray(x[0, 0])))
    assert module.router(x)[0, 0, 3] == 0
    before = module(x)[0, 0]
    down = module.experts.down_proj.weight
    down.set_value(down.get_value().at[3].set(jnp.inf))
    np.testing.assert_array_equal(module(x)[0, 0], before)


def test_taps_see_all_experts_and_change_nothing():
    module, seen = experts_of(), {}
    x = rows_of(1, 1)
    watched = module(x, tap=seen.__setitem__)
    np.testing.assert_array_equal(watched, module(x))
    assert seen["expert_weights"].shape == (1, 1, 5)
    for expert in range(5):
        alone = {}
        one_expert(module, expert)(x, tap=alone.__setitem__)
        np.testing.assert_allclose(seen["down_input"][expert], alone["down_input"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["w4a16", "rtn"])
def test_quantized_experts_compute_what_their_weights_stand_for(recipe):
    quantization = recipes.by_name(recipe)
    module = experts_of(quantization=quantization)
    parameters = parameters_of(module)
    plain = {n: v.dequantize() if isinstance(v, QuantizedTensor) else v for n, v in parameters.items()}
    assert plain["experts.down_proj.weight"].shape == (5, 24, 20)
    x = rows_of(2, 6)
    expected, found = with_parameters(experts_of(), plain)(x), module(x)
    # FP8 rows lose 2 to 3% at either matmul.
    tolerance = 1e-5 if quantization.activation_format == "none" else 0.06
    assert jnp.linalg.norm(found - expected) < tolerance * jnp.linalg.norm(expected)


def test_the_program_does_not_grow_with_the_number_of_experts():
    def lines(count: int) -> int:
        module = experts_of(dataclasses.replace(CONFIG, experts=ExpertsConfig(count, 2)))
        return len(jax.jit(lambda module, x: module(x)).lower(module, rows_of(2, 8)).as_text().splitlines())

    assert lines(4) == lines(12)


def test_models_survive_being_saved(tmp_path):
    config = dataclasses.replace(CONFIG, mlp_bias=True, sinks=True, experts=ExpertsConfig(3, 2, router_bias=True))
    model = nnx.jit(lambda: AutoModelForCausalLM(config, recipes.rtn(), rngs=nnx.Rngs(3)))()
    model.save(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.config == config
    before, after = parameters_of(model), parameters_of(loaded)
    assert before["layers.0.mlp.router.weight"].dtype == before["layers.0.self_attn.sinks"].dtype == jnp.float32
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "per_token is 6; expected at most 5"),
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts is '8'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2; only experts in all layers"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob is None"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "intermediate_size is 0"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit is 6.0; only 7.0"),
    ],
)
def test_configs_that_are_refused(case, changes, message, tmp_path):
    folder = write_folder(tmp_path / "m", family_fields(case, **changes), {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_numbers_of_experts_by_either_name():
    fields = family_fields("qwen3_moe")
    expected = config_from_huggingface(fields)
    fields["num_local_experts"] = fields.pop("num_experts")
    assert config_from_huggingface(fields) == expected
    assert expected.experts == ExpertsConfig(6, 3, normalized=False)
