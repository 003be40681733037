"""Simulated layers compute what models do, rounding by rounding, and what is measured of them adds up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from make_golden import FAMILIES, KEPT
from tiny_families import family_fields, family_tokens
from tiny_llama import write_folder

from fireq_jax import AutoModelForCausalLM, LlamaForCausalLM, ModelConfig, recipes
from fireq_jax.evaluation.activations import largest_to_median, measure_activations
from fireq_jax.evaluation.costs import average, cost_table, format_costs, load_report, measure_pieces, plot_costs
from fireq_jax.evaluation.perplexity import perplexity
from fireq_jax.evaluation.sensitivity import Piece, Sensitivity, pieces_of
from fireq_jax.evaluation.simulated import Roundings, embed, run_layer
from fireq_jax.models.parameters import abstract, parameters_of, with_parameters
from pallas_kernels.quantized_tensor import QuantizedTensor

CONFIG = ModelConfig(61, 64, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=64)
RECIPE = dataclasses.replace(
    recipes.rtn(), key_clip=0.95, value_clip=0.9, unbiased_keys=True, layer_kv_formats={"layers.0.*": "fp8"}
)
WINDOWS = np.random.default_rng(0).integers(0, 61, (3, 24), dtype=np.int32)
NOISY = "layers.1.mlp.down_proj.weight"


def shapes_of(recipe):
    return abstract(lambda: LlamaForCausalLM(CONFIG, recipe, dtype=jnp.float32))


def random_parameter(name, shapes):
    """Made by numpy, which compiles nothing: any codes under scales of 1, or floats."""
    random = np.random.default_rng(len(name))
    if isinstance(shapes, QuantizedTensor):
        codes = jnp.asarray(random.integers(0, 2**32, shapes.values.shape, np.uint32))
        scale = jnp.asarray(np.ones(shapes.group_scale.shape, shapes.group_scale.dtype))
        channel = jnp.asarray(np.full(shapes.channel_scale.shape, 0.03, np.float32))
        return dataclasses.replace(shapes, values=codes, group_scale=scale, channel_scale=channel)
    std = 0.4 if name == "lm_head" else 0.02
    values = np.ones(shapes.shape) if "norm" in name else random.normal(0, std, shapes.shape)
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def quantized():
    shapes = shapes_of(RECIPE)
    return with_parameters(shapes, {name: random_parameter(name, of) for name, of in parameters_of(shapes).items()})


@pytest.fixture(scope="module")
def exact(quantized):
    """What the codes stand for, but in one linear layer, where something is added to it."""
    coded = {name: value for name, value in parameters_of(quantized).items() if isinstance(value, QuantizedTensor)}
    decoded = jax.jit(lambda: {name: value.dequantize() for name, value in coded.items()})()
    parameters = parameters_of(quantized) | decoded
    parameters[NOISY] += 0.02 * jax.random.normal(jax.random.key(0), parameters[NOISY].shape)
    return with_parameters(shapes_of(recipes.none()), parameters)


@pytest.fixture(scope="module")
def sensitivity(exact, quantized):
    return Sensitivity(exact, quantized, {"a": WINDOWS[:2], "b": WINDOWS[2:]})


def test_everything_is_the_real_model(exact, quantized, sensitivity):
    everything = pieces_of(CONFIG, RECIPE)[0]
    cost = sensitivity.measure(everything)
    real = perplexity(quantized, WINDOWS[:2].reshape(-1), reference=exact, window=24, progress=False)
    # A value between two of FP8's may round either way under another order of sums.
    assert 0.001 < cost["a"].divergence == pytest.approx(real.divergence, rel=0.05)
    assert cost["a"].perplexity == pytest.approx(real.perplexity, rel=5e-3)
    assert cost["a"].loss == cost["a"].perplexity / sensitivity.perplexity["a"] - 1
    assert cost["b"] != cost["a"]


def test_weights_cost_where_they_differ(sensitivity):
    names = ("weights", "weights: down_proj", "weights: gate_up_proj", "weights: layer 0", "weights: layer 1")
    pieces = {piece.name: piece for piece in pieces_of(CONFIG, RECIPE)}
    costs = {name: sensitivity.measure(pieces[name])["a"].divergence for name in names}
    assert costs["weights: layer 0"] == costs["weights: gate_up_proj"] == pytest.approx(0, abs=1e-5)
    assert costs["weights"] == costs["weights: down_proj"] == pytest.approx(costs["weights: layer 1"], rel=1e-4)
    assert costs["weights"] > 1e-3
    assert [sensitivity.passes(pieces[name]) for name in names] == [6, 6, 6, 6, 3]
    assert sensitivity.estimate(list(pieces.values())) > 0


def test_each_rounding_costs_something_and_int4_more_than_fp8(sensitivity):
    costs = {}
    for rounding in ("activations fp8", "keys fp8", "keys int4", "values fp8", "values int4"):
        name, form = rounding.split()
        costs[rounding] = sensitivity.measure(Piece("", roundings=Roundings(**{name: form})))["a"].divergence
    assert min(costs.values()) > 0
    assert costs["keys int4"] > costs["keys fp8"]
    assert costs["values int4"] > costs["values fp8"]


def test_every_piece_is_named_once():
    for recipe in (RECIPE, recipes.none(), recipes.w4a16(), dataclasses.replace(RECIPE, lm_head_format="fp8")):
        names = [piece.name for piece in pieces_of(CONFIG, recipe)]
        assert len(set(names)) == len(names)
        assert {"everything", "keys int4", "values fp8"} <= set(names)
    assert "all but probabilities" not in names or recipe.query_format == "fp8"


def test_pieces_are_measured_once_and_shown(sensitivity, tmp_path, capsys, monkeypatch):
    pieces = {piece.name: piece for piece in pieces_of(CONFIG, RECIPE)}
    first, *others = (pieces[name] for name in ("weights", "weights: layer 0", "weights: layer 1"))
    path, settings = tmp_path / "apart.json", {"recipe": "mine"}
    measure_pieces(sensitivity, [first], path, settings)
    asked = []
    measure = sensitivity.measure
    monkeypatch.setattr(sensitivity, "measure", lambda piece: (asked.append(piece), measure(piece))[1])
    report = measure_pieces(sensitivity, [first, *others], path, settings)
    assert asked == others
    assert "2 of 3 pieces to measure: 9 passes" in capsys.readouterr().out
    assert report == load_report(path, settings)
    assert set(report["float perplexity"]) == set(report["costs"]["weights"]) == {"a", "b"}
    with pytest.raises(ValueError, match=rf"{path} was measured with {{'recipe': 'mine'}}"):
        load_report(path, {"recipe": "yours"})

    assert len(format_costs(report["costs"]).splitlines()) == 2 + 3 * 2
    assert cost_table(report["costs"]).count("<tr>") == 1 + 3 * 2
    bars, *_, curves = plot_costs(report["costs"], "title").axes
    divergence = {text: report["costs"]["weights"][text]["divergence"] for text in "ab"}
    assert [bar.get_width() for bar in bars.patches] == list(divergence.values())
    layers = [report["costs"][piece.name]["b"]["loss"] for piece in others]
    np.testing.assert_allclose(curves.lines[1].get_ydata(), 100 * np.asarray(layers))

    runs = [{"a": dict.fromkeys(("perplexity", "loss", "divergence", "agreement"), value)} for value in (0.1, 0.3)]
    assert "| mean | a | 0.2000 +- 0.1414 | 20.00 +- 14.14 |" in format_costs({"mean": average(runs)})
    assert len(plot_costs({"mean": average(runs)}, "title").axes[0].lines) == 0


def test_what_cannot_be_compared_is_refused(exact, quantized, sensitivity):
    with pytest.raises(ValueError, match=r"quantized weights in layers\.0\.self_attn\.qkv_proj \(and 7 more\)"):
        Sensitivity(quantized, quantized, {"a": WINDOWS})
    with pytest.raises(ValueError, match=r"a has windows of shape \(3, 1\)"):
        Sensitivity(exact, quantized, {"a": WINDOWS[:, :1]})
    with pytest.raises(ValueError, match=r"'layers\.7' matches no layer"):
        sensitivity.measure(Piece("", ("layers.7",)))
    smoothed = shapes_of(recipes.fireq())
    with pytest.raises(ValueError, match="convert it with float weights"):
        Sensitivity(exact, smoothed, {"a": WINDOWS})


@pytest.mark.parametrize("case", ["gemma2", "cohere", "gpt_oss"])
def test_simulated_families(case, tmp_path):
    """Norms around branches, parallel blocks, softcaps, windows, experts and sinks."""
    model = AutoModelForCausalLM.from_pretrained(
        write_folder(tmp_path / "model", family_fields(case)), dtype=jnp.float32
    )
    x = embed(model, family_tokens())
    for layer in model.layers:
        graph, state = nnx.split(layer)
        x = run_layer(graph, model.config, recipes.none(), Roundings(), state, x)
    golden = np.load(FAMILIES)[f"{case}.logits"]
    np.testing.assert_allclose(np.asarray(model.logits(x))[:, KEPT], golden, rtol=0, atol=2e-5 * np.abs(golden).max())


def test_activations_show_what_is_planted(exact):
    """A massive channel in one token's embedding, a large key channel, and a uniform first layer's attention."""
    parameters = parameters_of(exact)
    packed = parameters["layers.0.self_attn.qkv_proj.weight"]
    parameters["layers.0.self_attn.qkv_proj.weight"] = packed.at[:64].set(0).at[64 + 7].multiply(50)
    parameters["embed_tokens"] = parameters["embed_tokens"].at[WINDOWS[0, 5], 3].set(9.0)
    found = measure_activations(with_parameters(exact, parameters), WINDOWS, progress=False)
    assert found.tokens == WINDOWS.size
    assert found.hidden_max[0] == 9
    assert found.hidden_median[0] < 0.1
    assert found.keys.shape == (2, 2, 16)
    assert largest_to_median(found.keys[0, 0]) > 10 > largest_to_median(found.keys[0, 1])
    assert found.first_token[0] == pytest.approx(np.mean(1 / np.arange(2, 25)), rel=1e-5)
    assert {name: value.absmax.shape for name, value in found.inputs.items()} == {
        "qkv_input": (2, 64), "o_input": (2, 64), "gate_up_input": (2, 64), "down_input": (2, 96)
    }  # fmt: skip
    assert found.inputs["o_input"].kurtosis.min() > 1
    assert found.inputs["qkv_input"].absmax[0].argmax() == 3
    with pytest.raises(ValueError, match=r"shape \(3, 1\); expected \[windows, T\]"):
        measure_activations(exact, WINDOWS[:, :1])
