"""What callers hand to models: ids and masks, tokenizers' results, JAX's strict settings, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from tiny_families import family_fields
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fireq_jax import LlamaForCausalLM, ModelConfig, device_memory, generate, recipes
from fireq_jax.evaluation import perplexity
from fireq_jax.generation import check_call, stream
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.llama import CausalLM

VOCAB = 67
IDS = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
SAMPLED = {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}


@functools.cache
def model_of(recipe: str = "none") -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_layers": 1}
    return LlamaForCausalLM(ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=16), recipes.by_name(recipe))


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "uint64"])
def test_ids_of_any_integers_are_the_same(dtype):
    model = model_of()
    expected = model(IDS)
    np.testing.assert_array_equal(model(IDS.astype(dtype)), expected)
    if jnp.dtype(dtype).itemsize <= 4:
        np.testing.assert_array_equal(model(jnp.asarray(IDS.astype(dtype))), expected)


@pytest.mark.parametrize("bad", [VOCAB, -1, 1 << 32])
@pytest.mark.parametrize(
    "run", [lambda model, ids, mask: model(ids, mask), functools.partial(generate, max_new_tokens=1)]
)
def test_ids_outside_the_vocabulary_are_quoted_unless_masked(run, bad):
    ids = np.array([[bad, 3, 4]])
    for given in (ids, ids.tolist(), *([jnp.asarray(ids)] if abs(bad) < 1 << 31 else [])):
        with pytest.raises(ValueError, match=rf"input_ids holds \[{bad}\]; expected ids from 0 to {VOCAB - 1}"):
            run(model_of(), given, None)
        run(model_of(), given, [[0, 1, 1]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2], [3]], None, "input_ids has rows of different lengths"),
        ("text", None, r"input_ids is <U4 \(\); expected integers \[batch, tokens\]"),
        ([[1, 2]], [[1, 2]], r"attention_mask has values \[1 2\]; expected 0 and 1"),
        ([[1, 2]], [[1, -1]], r"attention_mask has values \[-1  1\]; expected 0 and 1"),
        ({"input_ids": IDS}, None, r"a dict of \['input_ids'\]; expected an array: pass a tokenizer's result as \*\*"),
    ],
)
def test_other_inputs_are_refused_alike(ids, mask, message):
    for run in (model_of(), functools.partial(generate, model_of(), max_new_tokens=1)):
        with pytest.raises(ValueError, match=message):
            run(ids, mask)


def test_a_tokenizer_s_result_is_passed_by_keywords():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcd")}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="a", model_max_length=16)
    encoded = tokenizer(["b c", "d"], padding=True, padding_side="left", return_token_type_ids=True)
    assert set(encoded) == {"input_ids", "token_type_ids", "attention_mask"}
    output = generate(model_of(), **encoded, max_new_tokens=3)
    assert output.sequences[1, 2:].tolist() == generate(model_of(), [[3]], max_new_tokens=3).sequences[0, 1:].tolist()
    with pytest.raises(ValueError, match="input_ids is a BatchEncoding of"):
        generate(model_of(), encoded, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"token_type_ids has values \[0 1\]; expected 0"):
        generate(model_of(), **{**encoded, "token_type_ids": [[0, 1], [0, 0]]}, max_new_tokens=3)
    with pytest.raises(TypeError, match="offset_mapping"):
        generate(model_of(), **encoded, offset_mapping=[], max_new_tokens=3)


def test_strict_settings_of_jax_are_met():
    """No implicit transfers, no implicit broadcasting between ranks, and a mesh whose axes are explicit."""
    model = model_of("fireq_plus")
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"), jax.set_mesh(jax.make_mesh((1,), ("x",))):
        logits = model(IDS.tolist(), MASK)
        greedy = generate(model, IDS, MASK, max_new_tokens=3).sequences
        generate(model, IDS, MASK, max_new_tokens=2, **SAMPLED)
        steps = [step.tokens for step in stream(model, IDS, MASK, max_new_tokens=3)]
        perplexity(model, IDS.ravel(), window=4, progress=False)
    np.testing.assert_array_equal(np.stack(steps, axis=1), greedy[:, -3:])
    assert np.isfinite(logits).all()
    assert not logits[0, :2].any()


@pytest.mark.parametrize("recipe", ["none", "w4a16", "w8a8_fp8", "fireq_bf16_scales"])
def test_models_broadcast_explicitly(recipe):
    model, ids = model_of(recipe), jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
    with jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(model, ids, ids).shape == (*IDS.shape, VOCAB)


@pytest.mark.parametrize("family", ["olmo3", "gemma2", "phi3 longrope", "cohere2", "gpt_oss"])
def test_families_broadcast_explicitly(family):
    config, ids = config_from_huggingface(family_fields(family)), jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(CausalLM(config, recipes.none()), ids, ids)


@pytest.mark.parametrize("recipe", ["none", "fireq"])
def test_ids_may_be_sharded_over_explicit_axes(recipe):
    """Only traced: there is one device here."""
    model, mesh = model_of(recipe), AbstractMesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    ids = jax.ShapeDtypeStruct(IDS.shape, jnp.int32, sharding=NamedSharding(mesh, jax.P("x")))
    with jax.sharding.use_abstract_mesh(mesh):
        plain = jax.eval_shape(model, ids)
        masked = jax.eval_shape(model, ids, ids)
    for logits in (plain, masked):
        assert logits.shape == (*IDS.shape, VOCAB)
        assert logits.sharding.spec == jax.P("x", None, None)


@pytest.mark.parametrize("recipe", ["none", "fireq"])
def test_flax_can_tabulate_a_model(recipe):
    rich = {"console_kwargs": {"force_terminal": False, "width": 200}}
    table = nnx.tabulate(model_of(recipe), IDS, **rich)
    for row in ("layers/0 ", "layers/0/self_attn/attend ", "logits ", "Total Parameters"):
        assert row in table


def test_a_cache_s_bytes_are_known_beforehand():
    model = model_of("fireq")
    # 2 kv heads of 16: 8 bytes and a bf16 scale each, for key and value.
    assert check_call(model, IDS, max_new_tokens=58) == 2 * 64 * 2 * 2 * (8 + 2)
    assert check_call(model_of(), IDS, max_new_tokens=58) == 2 * 64 * 2 * 2 * 16 * 2


def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    model = model_of()
    monkeypatch.setattr(device_memory.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 4, "SC_PAGE_SIZE": 4096}[name])
    assert check_call(model, IDS, max_new_tokens=58) == 16384
    with pytest.raises(ValueError, match="the cache of 2 x 128 tokens takes 32,768 bytes; 16,384 are available"):
        generate(model, IDS, max_new_tokens=59)
    with pytest.raises(ValueError, match="the logits of batch_size 1 x window 64 tokens takes 17,152 bytes; 16,384"):
        perplexity(model, np.ones(64, int), window=64, progress=False)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
    with pytest.raises(ValueError, match=f"takes 16,384 bytes beside the model's {model.nbytes:,}; 16,384"):
        check_call(abstract, IDS, max_new_tokens=58)


def test_room_on_a_gpu_is_what_the_allocator_has_left(monkeypatch):
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def check(stats):
        monkeypatch.setattr(device_memory, "default_device", lambda: Device(stats))
        device_memory.check_fits("the cache", 60)

    for stats in ({"bytes_limit": 100, "bytes_in_use": 40}, {}, None):
        check(stats)
    with pytest.raises(ValueError, match="the cache takes 60 bytes; 59 are available"):
        check({"bytes_limit": 100, "bytes_in_use": 41})
