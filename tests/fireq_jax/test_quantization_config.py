"""QuantizationConfig and the recipes: what they hold, JSON, and refusals."""

import dataclasses
import json

import pytest

from fireq_jax.models.block import linears_of
from fireq_jax.models.config import ExpertsConfig, ModelConfig
from fireq_jax.quantization import QuantizationConfig, SmoothingConfig, recipes
from fireq_jax.quantization.layer_patterns import parts_of
from pallas_kernels.codebooks import register_codebook


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip(name):
    config = dataclasses.replace(recipes.by_name(name), keep_float=("layers.0.*",))
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(QuantizationConfig.from_dict(config.to_dict()))  # a static argument of jit


def test_recipes_are_what_their_names_say():
    formats = {
        name: (c.weight_format, c.activation_format, c.kv_format, c.query_format)
        for name, c in ((name, recipes.by_name(name)) for name in recipes.RECIPES)
    }
    w4a8kv4 = ("int4", "fp8", "int4", "fp8")
    assert formats == {
        "fireq": w4a8kv4,
        "fireq_plus": w4a8kv4,
        "fireq_bf16_scales": w4a8kv4,
        "rtn": w4a8kv4,
        "w4a16": ("int4", "none", "none", "none"),
        "w8a8_fp8": ("fp8", "fp8", "none", "none"),
        "none": ("none", "none", "none", "none"),
    }
    assert recipes.fireq().smoothing == recipes.fireq_bf16_scales().smoothing == SmoothingConfig()
    assert recipes.fireq().channel_scale == "per_tensor_pow2"
    assert recipes.rtn().smoothing is None


def test_unknown_recipe_lists_all_of_them():
    with pytest.raises(ValueError, match="'gptq'") as error:
        recipes.by_name("gptq")
    assert all(f"\n  {name}: " in str(error.value) for name in recipes.RECIPES)


def test_a_recipe_in_a_file_changes_its_base_or_is_complete(tmp_path):
    path = tmp_path / "mine.json"
    for fields, expected in [
        ({"base": "fireq_plus", "group_size": 64}, dataclasses.replace(recipes.fireq_plus(), group_size=64)),
        ({"base": "rtn", "smoothing": {"alpha": 4.0}}, QuantizationConfig(smoothing=SmoothingConfig(alpha=4.0))),
        ({"base": "rtn", "layer_formats": {"*.o_proj": "fp8"}}, QuantizationConfig(layer_formats={"*.o_proj": "fp8"})),
        ({"base": "fireq", "smoothing": None}, dataclasses.replace(recipes.fireq(), smoothing=None)),
        (recipes.fireq_plus().to_dict(), recipes.fireq_plus()),
    ]:
        path.write_text(json.dumps(fields))
        assert recipes.by_name_or_file(str(path)) == expected
    own = dataclasses.replace(recipes.fireq_plus().smoothing, query_exponent=0.5)
    path.write_text('{"base": "fireq_plus", "smoothing": {"query_exponent": 0.5}}')
    assert recipes.from_file(path).smoothing == own
    for fields, quoted in [
        ({"base": "gptq"}, r"mine\.json: recipe is 'gptq'"),
        ({"base": 3}, r"mine\.json: base is 3"),
        ({"group_size": 64}, "are missing; .* or a recipe to start from"),
        ({"base": "rtn", "grouped": 64}, r"mine\.json: unknown QuantizationConfig keys \['grouped'\]"),
        ({"base": "rtn", "smoothing": {"alfa": 1}}, r"unknown SmoothingConfig keys \['alfa'\]"),
        ({"base": "rtn", "smoothing": 3}, "smoothing is 3; expected an object"),
        ({"base": "rtn", "group_size": 32}, r"mine\.json: group_size is 32"),
    ]:
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=quoted):
            recipes.from_file(path)
    with pytest.raises(ValueError, match=r"gone\.json is missing"):
        recipes.by_name_or_file("gone.json")


def test_each_recipe_says_what_it_is_and_when_to_take_it():
    text = recipes.described()
    assert all(f"\n  {name} " in "\n" + text for name in recipes.RECIPES)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("fields", "quoted"),
    [
        ({"weight_format": "int3"}, "'int3'"),
        ({"activation_format": "int8"}, "'int8'"),
        ({"group_size": 32}, "group_size is 32"),
        ({"scale_dtype": "f32"}, "'f32'"),
        ({"channel_scale": "per_row"}, "'per_row'"),
        ({"rounding": "up"}, "'up'"),
        ({"kv_format": "int8"}, "'int8'"),
        ({"kv_group_size": 0}, "kv_group_size is 0"),
        ({"key_clip": 0.0}, r"key_clip is 0\.0"),
        ({"value_clip": 1.5}, r"value_clip is 1\.5"),
        ({"calibration_stream": "both"}, "'both'"),
        ({"weight_format": "fp8", "scale_search": True}, "need one of weight_format .*, not 'fp8'"),
        ({"learned_steps": -1}, "learned_steps is -1"),
        ({"learned_steps": 10**12}, "learned_steps is 1000000000000; expected 0 to"),
        ({"weight_format": ["int4"]}, r"weight_format is \['int4'\]; expected one of"),
        ({"kv_format": None}, "kv_format is None; expected one of"),
        ({"weight_format": "fp8", "learned_steps": 10}, "learned_steps need one of weight_format .*, not 'fp8'"),
        ({"query_format": "bf16"}, "'bf16'"),
        ({"weight_format": "fp8", "activation_format": "none"}, "'fp8' needs"),
        ({"weight_format": "none"}, "'fp8' needs quantized weights"),
        ({"smoothing": {"alpha": 0.0}}, r"alpha is 0\.0"),
        ({"smoothing": {"pair_statistic": "mean"}}, "'mean'"),
        ({"smoothing": {"value_basis": "pca"}}, "'pca'"),
        ({"smoothing": {"search_columns": True, "activation_exponent": 0.5}}, r"activation_exponent is 0\.5"),
        ({"smoothing": {"search_keys": True, "query_exponent": 0.5}}, r"query_exponent is 0\.5"),
        ({"smoothing": {"search_keys": True, "pre_rope": False, "post_rope_channels": 0}}, "nothing to search"),
        ({"smoothing": {"fit_pairs": True}}, "no post_rope_channels, not True and 4"),
        ({"smoothing": {"query_exponent": 1.5}}, r"query_exponent is 1\.5"),
        ({"smoothing": {"activation_exponent": -0.5}}, r"activation_exponent is -0\.5"),
        ({"smoothing": {"beta": float("nan")}}, "beta is nan"),
        ({"smoothing": {"alpha": float("inf")}}, "alpha is inf"),
        ({"smoothing": {"alpha": 1e300}}, r"alpha is 1e\+300"),
        ({"smoothing": {"post_rope_channels": -1}}, "post_rope_channels is -1"),
        ({"smoothing": {"column_statistic": "median"}}, "'median'"),
        ({"wieght_format": "int4"}, "'wieght_format'"),
        ({"smoothing": {"aplha": 1.0}}, "'aplha'"),
        ({"smoothing": 5}, "smoothing is 5; expected an object"),
        ({"group_size": 64.0}, r"group_size is 64\.0; expected a whole number"),
        ({"key_clip": "0.9"}, "key_clip is '0.9'; expected a number"),
        ({"keep_float": None}, "keep_float is None; expected a list"),
        ({"keep_float": [3]}, r"keep_float is \[3\]; expected a tuple of patterns"),
    ],
)
def test_errors_quote_the_offending_key_or_value(fields, quoted):
    complete = {**QuantizationConfig().to_dict(), **fields}
    if isinstance(smoothing := complete["smoothing"], dict):
        complete["smoothing"] = {**dataclasses.asdict(SmoothingConfig()), **smoothing}
    with pytest.raises(ValueError, match=quoted):
        QuantizationConfig.from_dict(complete)


def test_a_key_that_is_missing_is_no_default():
    fields = recipes.fireq_plus().to_dict()
    del fields["key_clip"], fields["unbiased_keys"]
    with pytest.raises(ValueError, match=r"keys \['key_clip', 'unbiased_keys'\] are missing"):
        QuantizationConfig.from_dict(fields)
    fields = recipes.fireq_plus().to_dict()
    del fields["smoothing"]["alpha"]
    with pytest.raises(ValueError, match=r"SmoothingConfig keys \['alpha'\] are missing"):
        QuantizationConfig.from_dict(fields)


def test_patterns_may_be_a_list_but_not_a_string():
    assert QuantizationConfig(keep_float=["layers.0.*"]) == QuantizationConfig(keep_float=("layers.0.*",))
    with pytest.raises(ValueError, match=r"keep_float is 'layers\.0\.\*'; expected a tuple"):
        QuantizationConfig(keep_float="layers.0.*")


@pytest.mark.parametrize(("kv_format", "query"), [("none", "none"), ("fp8", "fp8"), ("int4", "fp8")])
def test_kv_format_override_sets_the_query_format_with_it(kv_format, query):
    config = recipes.fireq().with_kv_format(kv_format)
    assert (config.kv_format, config.query_format) == (kv_format, query)
    assert dataclasses.replace(config, kv_format="int4", query_format="fp8") == recipes.fireq()


def test_keep_float_patterns():
    config = QuantizationConfig(keep_float=("layers.0.*", "*.down_proj"))
    names = ["layers.0.self_attn.qkv_proj", "layers.1.mlp.down_proj", "layers.10.mlp.gate_up_proj"]
    assert [config.keeps_float(name) for name in names] == [True, True, False]
    config.check_fits(names, head_dim=64)
    with pytest.raises(ValueError, match=r"'\*\.down_proj' matches no layer"):
        config.check_fits(names[:1], head_dim=64)
    assert recipes.none().keeps_float(names[2])


@pytest.mark.parametrize(
    ("change", "quoted"),
    [({"kv_group_size": 48}, "kv_group_size is 48"), ({"smoothing": SmoothingConfig(post_rope_channels=65)}, "is 65")],
)
def test_sizes_that_do_not_fit_the_heads_are_refused_before_work_starts(change, quoted):
    config = dataclasses.replace(recipes.fireq(), **change)
    with pytest.raises(ValueError, match=quoted):
        config.check_fits([], head_dim=64)


@pytest.mark.parametrize("smoothing", ["x", {"alpha": 8.0}, lambda x: x, SmoothingConfig, True])
def test_smoothing_is_a_config_or_none(smoothing):
    with pytest.raises(ValueError, match=r"smoothing is .*; expected SmoothingConfig or None"):
        QuantizationConfig(smoothing=smoothing)


@pytest.mark.parametrize("patterns", [None, 5, {"layers.0.*"}, (1,)])
def test_patterns_of_another_kind(patterns):
    with pytest.raises(ValueError, match=r"keep_float is .*; expected a tuple of patterns"):
        QuantizationConfig(keep_float=patterns)


def test_rounding_to_nearest_keeps_formats_and_nothing_else():
    changes = {"kv_format": "fp8", "lm_head_format": "fp8", "keep_float": ("layers.0.*",), "scale_dtype": "bf16"}
    for recipe in (recipes.fireq(), recipes.fireq_plus()):
        plain = dataclasses.replace(recipe, **changes).round_to_nearest()
        assert plain == dataclasses.replace(recipes.rtn(), **changes)


NAMES = [f"layers.{i}.{name}" for i in (0, 1) for name in
         ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]  # fmt: skip


def test_layers_have_the_formats_that_the_last_pattern_says():
    """``keep_float`` goes first; and what the config says survives JSON, with and without patterns."""
    config = dataclasses.replace(
        recipes.fireq_plus(),
        layer_formats={"*.mlp.*": "nf4", "layers.1.mlp.down_proj": "fp8", "*.[qkv]_proj": "none"},
        layer_kv_formats=[("layers.1.*", "fp8")],
        keep_float=("layers.0.mlp.down_proj",),
    )
    config.check_fits(NAMES, head_dim=64)
    found = ["none", "int4", "nf4", "none", "none", "int4", "nf4", "fp8"]
    assert [config.weight_format_of(name) for name in NAMES] == found
    assert [config.for_attention(f"layers.{i}.self_attn").kv_format for i in (0, 1)] == ["int4", "fp8"]
    assert config.for_linear(NAMES[6]) == dataclasses.replace(recipes.fireq_plus(), weight_format="nf4")
    assert not config.for_linear(NAMES[7]).reads_text
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(QuantizationConfig.from_dict(config.to_dict()))
    assert "layer_formats" not in recipes.fireq_plus().to_dict()  # which earlier versions do not have


def test_names_of_fused_layers_are_those_of_the_models():
    for experts in (None, ExpertsConfig(2, 1)):
        config = ModelConfig(9, 32, 48, 1, 2, 1, 16, experts=experts)
        for linear in linears_of(config):
            assert parts_of(linear.name) == (list(linear.parts) if len(linear.parts) > 1 else [])


@pytest.mark.parametrize(
    ("fields", "quoted"),
    [
        ({"layer_formats": {"layers.0.*": "int3"}}, r"layer_formats of 'layers\.0\.\*' is 'int3'; expected one of"),
        ({"layer_formats": "layers.0.*"}, r"layer_formats is 'layers\.0\.\*'; expected pairs"),
        ({"layer_kv_formats": [("*", "nf4")]}, r"layer_kv_formats of '\*' is 'nf4'"),
        ({"activation_format": "none", "layer_formats": {"*.o_proj": "fp8"}}, r"'fp8' of layer_formats '\*\.o_proj'"),
        ({"layer_formats": {"layers.1.down_proj": "fp8"}}, r"matches no layer; layers are \['layers.1.mlp.down_proj'"),
        (
            {"layer_formats": {"layers.1.self_attn.k_proj": "fp8"}},
            r"matches layers.1.self_attn.k_proj alone, .* layers.1.self_attn.qkv_proj",
        ),
        ({"keep_float": ("*.up_proj",)}, r"'\*\.up_proj' matches layers\.0\.mlp\.up_proj alone, .*gate_up_proj"),
        ({"layer_formats": {"*.down_proj": "fp8", "*": "nf4"}}, r"'\*\.down_proj' decides nothing"),
        ({"layer_formats": {"*.down_proj": "fp8"}, "keep_float": ("*.mlp.*",)}, r"'\*\.down_proj' decides nothing"),
        ({"layer_kv_formats": {"layers.1.mlp.*": "fp8"}}, "matches no layer; layers are .*self_attn"),
    ],
)
def test_formats_of_layers_that_cannot_be(fields, quoted):
    with pytest.raises(ValueError, match=quoted):
        QuantizationConfig(**fields).check_fits(NAMES, head_dim=64)


def test_a_config_holds_the_codebooks_that_it_uses(tmp_path):
    """So that another process reads it without having registered them."""
    register_codebook("own_config", (0, 1, 2, 3, 4, 5, 6, 8))
    config = dataclasses.replace(recipes.rtn(), layer_formats={"*.o_proj": "own_config"})
    assert config.codebooks == (("own_config", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)),)
    fields = json.loads(json.dumps(config.to_dict()))
    assert QuantizationConfig.from_dict(fields) == config
    renamed = json.loads(json.dumps(fields).replace("own_config", "never_registered"))
    assert QuantizationConfig.from_dict(renamed).weight_format_of("layers.0.self_attn.o_proj") == "never_registered"
    path = tmp_path / "mine.json"
    path.write_text('{"base": "rtn", "weight_format": "mine", "codebooks": {"mine": [0, 1, 2, 3, 4, 6, 8, 12]}}')
    assert recipes.from_file(path).codebooks[0][1][-1] == 12
    fields["codebooks"][0][1][-1] = 9
    with pytest.raises(ValueError, match=r"'own_config' is .*9\.0\), and is registered as .*8\.0\)"):
        QuantizationConfig.from_dict(fields)
    for codebooks, quoted in [(3, "codebooks is 3"), ({"x": 3}, "codebook 'x' is 3; expected eight numbers")]:
        with pytest.raises(ValueError, match=quoted):
            QuantizationConfig(codebooks=codebooks)
