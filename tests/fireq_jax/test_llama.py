"""The model against transformers, against itself in other paths, and quantized against dequantized."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from make_golden import GOLDEN, KEPT, reference_logits
from tiny_llama import CASES, config_of, tokens_of, weights_of

from checkpoints_convert.calibrate import run_layer
from fireq_jax import LlamaForCausalLM, QuantizationConfig, recipes
from fireq_jax.models import attention, llama, parameters
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.block import linear_names
from pallas_kernels import formats
from pallas_kernels.matmul import matmul
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.split_k import SplitKPartials

HAS_TORCH = importlib.util.find_spec("torch") is not None
forward = nnx.jit(lambda model, tokens, mask=None: model(tokens, mask))
prefill = nnx.jit(lambda model, tokens, lengths, capacity: model.prefill(tokens, lengths, capacity), static_argnums=3)
extend = nnx.jit(lambda model, tokens, lengths, cache: model.extend(tokens, lengths, cache))


def build(fields, quantization=None, dtype=jnp.float32):
    """The model of a config.json with ``weights_of`` it."""
    config, quantization = config_from_huggingface(fields), quantization or recipes.none()
    table, tensors = tensor_table(fields, config), weights_of(fields)
    filled = {}
    for index in range(config.num_layers):
        prefix = table.prefix.format(index=index)
        block = {name: jnp.asarray(source.read(tensors[prefix + source.name])) for name, source in table.block.items()}
        smoothing, random = quantization.smoothing, np.random.default_rng(index)
        by_channel = random.uniform(0.5, 2, (config.num_kv_heads, config.head_dim))
        if smoothing is not None and smoothing.post_rope_channels:
            block["self_attn.post_rope_scale"] = jnp.asarray(by_channel)
        if smoothing is not None and smoothing.key_offset:
            block["self_attn.key_offset"] = jnp.asarray(by_channel)
        # How codes were chosen does not show in the model; choosing them by text is tested elsewhere.
        unmeasured = dataclasses.replace(quantization, scale_search=False, error_compensation=False)
        filled |= parameters.layer_parameters(block, index, unmeasured, dtype)
    rest = {name: tensors[source.name] for name, source in table.outside.items()}
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, quantization, dtype=dtype))
    return parameters.with_parameters(model, filled | parameters.global_parameters(rest, quantization, dtype))


@functools.cache
def float_model(case="gqa"):
    return build(config_of(case))


# --- the float model equals transformers ---------------------------------------------------------


def assert_float32_equal(logits, expected):
    """To float32 rounding: about 50 sums of up to 250 terms follow each other; measured 3e-6 of the largest logit."""
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    """Every position live where torch is installed; the last positions against the golden file everywhere."""
    fields = config_of(case)
    tokens = tokens_of(fields)
    logits = np.asarray(forward(float_model(case), tokens))
    assert logits.dtype == np.float32
    assert_float32_equal(logits[:, KEPT], np.load(GOLDEN)[case])
    if HAS_TORCH:
        assert_float32_equal(logits, reference_logits(fields, weights_of(fields), tokens))


# Left, right, both, holes, one token, none.
MASK = np.ones((6, 40), np.int32)
MASK[0, :9] = MASK[1, 31:] = MASK[2, :3] = MASK[2, 20:] = MASK[3, 4:30:3] = MASK[4, 1:] = MASK[5] = 0


def test_padding_anywhere_changes_nothing():
    """Each row equals its own tokens alone, wherever the padding is; the padding's logits are 0."""
    model, fields = float_model(), config_of("gqa")
    tokens = np.tile(tokens_of(fields)[:1], (6, 1))
    logits = np.asarray(forward(model, np.where(MASK, tokens, 13), MASK))
    assert not logits[MASK == 0].any()
    for row, mask in zip(logits, MASK.astype(bool), strict=True):
        # Causal: the logits of the first tokens do not depend on what follows.
        packed = np.concatenate([tokens[0, mask], tokens[0, ~mask]])[None]
        assert_float32_equal(row[mask], np.asarray(forward(model, packed))[0, : mask.sum()]) if mask.any() else None


def test_lists_are_taken_and_other_shapes_are_refused():
    model = float_model()
    np.testing.assert_array_equal(model([[1, 2]], [[1, 1]]), model(np.array([[1, 2]]), np.ones((1, 2))))
    for ids, message in (
        ([1, 2], r"int64 \(2,\); expected integers \[batch, tokens\]"),
        ([[0.5]], r"float64 \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids)
    with pytest.raises(ValueError, match=r"shape \(2, 0\); expected prompts of at least one token"):
        model(np.zeros((2, 0), np.int32))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1\); expected that of input_ids, \(1, 2\)"):
        model([[1, 2]], [[1]])


@pytest.mark.skipif(not HAS_TORCH, reason="compares with transformers live")
def test_padded_logits_equal_transformers():
    tokens = np.tile(tokens_of(config_of("gqa"))[:1], (4, 1))
    mask = MASK[:4]
    expected = reference_logits(config_of("gqa"), weights_of(config_of("gqa")), tokens, mask)
    logits = np.asarray(forward(float_model(), tokens, mask))
    assert_float32_equal(logits[mask > 0], expected[mask > 0])


def test_bf16_is_the_same_model():
    """The same classes; 2^-8 relative rounding at some twenty places, measured 0.02 of the largest logit."""
    fields = config_of("gqa")
    model = build(fields, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    dtypes = {name: value.dtype for name, value in parameters.parameters_of(model).items()}
    assert all(dtype == (jnp.float32 if "norm" in name else jnp.bfloat16) for name, dtype in dtypes.items())
    logits = np.asarray(forward(model, tokens_of(fields)))
    exact = np.asarray(forward(float_model(), tokens_of(fields)))
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() < 0.06 * np.abs(exact).max()


# --- the cache changes nothing ----------------------------------------------------------------------

ONE_LAYER = config_of("gqa", num_hidden_layers=1)
RECIPES = {name: recipe() for name, recipe in recipes.RECIPES.items()}


@functools.cache
def one_layer(recipe):
    return build(ONE_LAYER, RECIPES[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_prefill_and_extend_equal_the_full_forward(recipe):
    """Ragged prompts; then a chunk of 18 (prefill op) and two of up to 2 tokens (decode op).

    Without FP8 only float32 rounding differs.  With it, a value within float32 rounding of the
    middle of two E4M3 numbers may round either way (half a unit in the last place, 2^-4 of one
    activation of 48), so those recipes get 2% of the largest logit.
    """
    model, quantization = one_layer(recipe), RECIPES[recipe]
    tokens = tokens_of(ONE_LAYER)
    full = np.asarray(forward(model, tokens))
    exact = quantization.activation_format == quantization.query_format == "none"
    tolerance = (2e-5 if exact else 0.02) * np.abs(full).max()

    done = np.int32([7, 4])
    logits, cache = prefill(model, tokens[:, :7], done, 40)
    steps = [(done, logits)]
    for count in ([16, 18], [1, 2], [2, 0]):
        new = np.int32(count)
        rows = zip(tokens, done, new, strict=True)
        chunk = np.stack([np.resize(row[begin : begin + n], max(count)) for row, begin, n in rows])
        logits, cache = extend(model, chunk, new, cache)
        done = done + new
        steps.append((done, logits))
    np.testing.assert_array_equal(cache.lengths, done)
    for i, (lengths, logits) in enumerate(steps):
        rows = [0] if i == len(steps) - 1 else [0, 1]  # the last step gives row 1 nothing
        np.testing.assert_allclose(np.asarray(logits)[rows], full[rows, lengths[rows] - 1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("recipe", ["none", "fireq"])
def test_attention_reads_no_slot_behind_the_cache(recipe, monkeypatch):
    """Of a sequence that has outgrown its cache it is told the slots that there are."""
    seen = []
    original = attention.decode_attention

    def spy(*args, kv_lengths, **kwargs):
        seen.append(np.asarray(kv_lengths))
        return original(*args, kv_lengths=kv_lengths, **kwargs)

    monkeypatch.setattr(attention, "decode_attention", spy)
    model = one_layer(recipe)
    with jax.disable_jit():
        _, cache = model.prefill(jnp.ones((2, 6), int), jnp.int32([6, 3]), 8)
        for _ in range(3):
            _, cache = model.extend(jnp.ones((2, 1), int), jnp.int32([1, 1]), cache)
    np.testing.assert_array_equal(seen, [[7, 4], [8, 5], [8, 6]])


def test_a_prompt_longer_than_the_cache_is_an_error():
    with pytest.raises(ValueError, match="prompt has 40 tokens; the cache holds 39"):
        float_model().prefill(jnp.asarray(tokens_of(ONE_LAYER)), jnp.asarray([40, 40]), 39)


# --- the quantized model -------------------------------------------------------------------------------


def dequantized(model):
    """The float model of the numbers that a quantized model stands for."""
    values = {
        name: value.dequantize() if isinstance(value, QuantizedTensor) else value
        for name, value in parameters.parameters_of(model).items()
    }
    abstract = nnx.eval_shape(lambda: LlamaForCausalLM(model.config, recipes.none(), dtype=jnp.float32))
    return parameters.with_parameters(abstract, values)


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16"])
@pytest.mark.parametrize("case", ["gqa", "biases_head_dim_24"])
def test_w4a16_equals_the_float_model_of_its_dequantized_weights(case, scale_dtype):
    """Sizes 48 and 100 are not multiples of 128, nor 100 of 8: the padding must not show."""
    quantization = QuantizationConfig(
        activation_format="none", kv_format="none", query_format="none", scale_dtype=scale_dtype
    )
    model = build(config_of(case), quantization)
    tokens = tokens_of(config_of(case))
    assert_float32_equal(np.asarray(forward(model, tokens)), np.asarray(forward(dequantized(model), tokens)))


@pytest.mark.parametrize("recipe", ["rtn", "w8a8_fp8"])
def test_quantized_activations_stay_near(recipe):
    """Against the same weights in float: FP8 rows lose 2.6% (rms) at four places, INT4 keys and values about 10%."""
    model = one_layer(recipe)
    tokens = tokens_of(ONE_LAYER)
    logits, exact = np.asarray(forward(model, tokens)), np.asarray(forward(dequantized(model), tokens))
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < (0.25 if recipe == "rtn" else 0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_an_fp8_head_stays_near(tied):
    """Rows and weights of E4M3 each lose 2.6% (rms) of what they are, and nothing else changes."""
    config = dataclasses.replace(config_from_huggingface(ONE_LAYER), tie_word_embeddings=tied)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    quantization = dataclasses.replace(recipes.none(), lm_head_format="fp8")
    head = (model.embed_tokens if tied else model.lm_head).get_value()
    abstract = nnx.eval_shape(lambda: LlamaForCausalLM(config, quantization, dtype=jnp.float32))
    filled = parameters.parameters_of(model) | parameters.global_parameters({"lm_head": head}, quantization, "float32")
    quantized = parameters.with_parameters(abstract, filled)
    tokens = tokens_of(ONE_LAYER)
    logits, exact = np.asarray(forward(quantized, tokens)), np.asarray(forward(model, tokens))
    assert 0.02 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("recipe", "dtype", "expected"),
    [
        (recipes.fireq(), jnp.bfloat16, formats.E4M3),
        (recipes.fireq(), jnp.float32, jnp.float32),
        (recipes.none(), jnp.bfloat16, jnp.bfloat16),
        (dataclasses.replace(recipes.fireq(), keep_float=("*.o_proj",)), jnp.bfloat16, jnp.bfloat16),
    ],
    ids=["fp8", "float32", "float", "o_proj kept float"],
)
def test_attention_quantizes_what_o_proj_would(recipe, dtype, expected, monkeypatch):
    """Bit for bit, and so it is when a tap watches."""
    asked, taps = [], {}

    def spy(*arguments, out_dtype, **options):
        asked.append(out_dtype)
        return prefill_attention(*arguments, out_dtype=out_dtype, **options)

    monkeypatch.setattr(attention, "prefill_attention", spy)
    config = config_from_huggingface(config_of("gqa"))
    layer = build(config_of("gqa"), recipe, dtype=dtype).layers[0]
    hidden = jax.random.normal(jax.random.key(0), (2, 7, config.hidden_size), dtype)
    plain = nnx.jit(lambda layer, x: run_layer(layer, config, x))(layer, hidden)
    tapped = nnx.jit(lambda layer, x: run_layer(layer, config, x, taps.__setitem__))(layer, hidden)
    assert [jnp.dtype(x) for x in asked] == [jnp.dtype(expected)] * 2
    assert taps["o_input"].shape == (2, 7, config.num_heads * config.head_dim)
    np.testing.assert_array_equal(np.asarray(plain, np.float32), np.asarray(tapped, np.float32))


def test_sums_that_matmuls_leave_in_parts_are_added_by_who_reads_them(monkeypatch):
    """The logits are those of whole matmuls, whatever reads the sums: a norm, with or without quantization, or RoPE."""

    def in_parts(x, weight, *, activation, residual, **options):
        if activation != "none":
            return matmul(x, weight, activation=activation, **options)
        unscaled = jnp.einsum("...k,nk->...n", x.values.astype(jnp.float32), weight.unscaled())
        left_in_parts.append(weight.shape)
        flat = unscaled.reshape(-1, weight.shape[0])
        parts = jnp.stack([flat / 4, flat / 2, flat / 4])
        scale, rows = weight.channel_scale[: weight.shape[0]], unscaled.shape[:-1]
        left = None if residual is None else residual.reshape(flat.shape)
        return SplitKPartials(parts, scale, x.scale.reshape(-1), None, left, rows, weight.shape[0], activation)

    tokens = tokens_of(config_of("gqa"))
    for keep_float in ((), ("*.qkv_proj", "layers.1.mlp.gate_up_proj")):
        quantization = dataclasses.replace(recipes.fireq(), keep_float=keep_float)
        model = build(config_of("gqa"), quantization, dtype=jnp.bfloat16)
        expected = np.asarray(model(tokens))
        left_in_parts: list[tuple[int, int]] = []
        with monkeypatch.context() as patch:
            patch.setattr("pallas_kernels.projection.unreduced_matmul", in_parts)
            llama._run_layer.clear_cache()
            found = np.asarray(model(tokens))
        llama._run_layer.clear_cache()
        assert left_in_parts
        # Where the sum falls on another side of a bf16 or FP8 step.
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02


def test_keep_float_leaves_layers_as_they_are():
    quantization = QuantizationConfig(keep_float=("layers.0.*", "*.down_proj"))
    model = build(config_of("gqa"), quantization)
    kept = {
        name.removesuffix(".weight")
        for name, value in parameters.parameters_of(model).items()
        if "proj" in name and not isinstance(value, QuantizedTensor)
    }
    names = linear_names(model.config)
    assert kept == {name for name in names if name.startswith("layers.0.") or name.endswith("down_proj")}
    plain, exact = parameters.parameters_of(model), parameters.parameters_of(float_model())
    for name in kept:
        np.testing.assert_array_equal(plain[f"{name}.weight"], exact[f"{name}.weight"])


def test_keep_float_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match=r"'layers\.7\.\*' matches no layer"):
        build(config_of("gqa"), QuantizationConfig(keep_float=("layers.7.*",)))


def test_random_models_have_the_form_of_loaded_ones():
    """Made directly in storage format, with 4-bit weights: bytes are those of the loaded model."""
    config = config_from_huggingface(config_of("biases_head_dim_24"))
    for quantization in RECIPES.values():
        random = nnx.eval_shape(lambda q=quantization: LlamaForCausalLM(config, q))
        filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parameters.parameters_of(random))
        assert random.nbytes == sum(x.nbytes for x in jax.tree.leaves(filled))


def test_with_parameters_names_what_does_not_fit():
    model = float_model()
    good = parameters.parameters_of(model)
    name = "layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        parameters.with_parameters(model, {key: value for key, value in good.items() if key != name})
    with pytest.raises(ValueError, match="extra is not part"):
        parameters.with_parameters(model, {**good, "extra": good[name]})
    with pytest.raises(ValueError, match=rf"{name} is float32\[48, 99\]; expected float32\[48, 100\]"):
        parameters.with_parameters(model, {**good, name: good[name][:, :99]})
    with pytest.raises(ValueError, match="bfloat16"):
        parameters.with_parameters(model, {**good, name: good[name].astype(jnp.bfloat16)})
