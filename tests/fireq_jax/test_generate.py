"""Generation on small random models, against repeated full forward passes and against itself."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_checkpoint import write_checkpoint
from tiny_llama import config_of

from fireq_jax import LlamaForCausalLM, ModelConfig, generate, recipes
from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.generation import check_call, stream, warmup
from fireq_jax.generation.generate import GLANCE, _next_count
from fireq_jax.generation.programs import decode, prefill
from fireq_jax.generation.request import BUCKET, prepare, round_up

VOCAB = 97
PROMPTS = [[11, 12, 13, 14, 15], [3], [40, 2, 77]]
NEW = 12


def make_model(
    recipe: str = "none", *, layers: int = 1, cls: type[LlamaForCausalLM] = LlamaForCausalLM, **options
) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_layers": layers}
    config = ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=16, **options)
    model = cls(config, recipes.by_name(recipe), dtype=jnp.float32, rngs=nnx.Rngs(1))
    # Decided logits: neither ties for greedy, nor uniform noise for sampling.
    model.lm_head.set_value(model.lm_head.get_value() * 20)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module", params=["none", "rtn", "fireq"])
def any_model(request) -> LlamaForCausalLM:
    return make_model(request.param, layers=2)


def padded(prompts: list[list[int]], side: str, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and mask [B, T]."""
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), fill), np.zeros((len(prompts), width), int)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return ids, mask


def greedy_by_full_forward(model: LlamaForCausalLM, prompts: list[list[int]], count: int, penalty: float = 1.0):
    """New tokens of each prompt, from the logits of all tokens so far, without a cache."""
    forward = nnx.jit(lambda model, ids, mask: model(ids, attention_mask=mask))
    width = max(map(len, prompts)) + count
    texts = [list(prompt) for prompt in prompts]
    for _ in range(count):
        ids, mask = padded([*texts, [0] * width], "right")
        logits = np.array(forward(model, ids, mask))
        for row, text in enumerate(texts):
            last, used = logits[row, len(text) - 1], np.unique(text)
            last[used] = np.where(last[used] > 0, last[used] / penalty, last[used] * penalty)
            text.append(int(np.argmax(last)))
    return [text[-count:] for text in texts]


def new_tokens(model: LlamaForCausalLM, prompts: list[list[int]], side: str = "left", fill: int = 0, **options):
    ids, mask = padded(prompts, side, fill)
    output = generate(model, ids, attention_mask=mask, **{"max_new_tokens": NEW, **options})
    return np.asarray(output.sequences[:, ids.shape[1] :]).tolist()


def compilations(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


def programs(caplog) -> set[str]:
    """Names of what was compiled."""
    return {name for name in ("prefill", "decode") if any(f"jit({name})" in text for text in compilations(caplog))}


def test_greedy_is_that_of_repeated_full_forward(any_model):
    expected = greedy_by_full_forward(any_model, PROMPTS, NEW)
    assert new_tokens(any_model, PROMPTS, "right") == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_each_prompt_alone(any_model, side):
    batch = new_tokens(any_model, PROMPTS, side)
    assert batch == [new_tokens(any_model, [prompt])[0] for prompt in PROMPTS]


def test_ids_under_padding_are_free_and_padding_may_be_anywhere(model):
    ids, mask = [[-100, 11, 12, 999, 13, 14, 15, -1]], [[0, 1, 1, 0, 1, 1, 1, 0]]
    output = generate(model, ids, attention_mask=mask, max_new_tokens=NEW)
    assert output.sequences[0, :8].tolist() == ids[0]
    assert output.sequences[0, 8:].tolist() == new_tokens(model, PROMPTS[:1])[0]


def test_eos_ends_each_sequence_and_padding_follows(model):
    free = new_tokens(model, PROMPTS)
    ends = [free[0][4], free[2][6]]
    ids, mask = padded(PROMPTS, "left")
    output = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_ids=ends, pad_token_id=96)
    for row, text in enumerate(free):
        hits = [step for step, token in enumerate(text) if token in ends]
        length = hits[0] + 1 if hits else NEW
        assert output.sequences[row].tolist() == [*ids[row], *text[:length], *[96] * (NEW - length)]
        assert output.lengths[row] == length
        assert output.finished[row] == bool(hits)
    assert output.finished[0]
    assert output.finished[2]


def test_models_eos_ids_are_the_default_and_pad(model):
    end = new_tokens(model, PROMPTS[:1])[0][3]
    ending = make_model(eos_token_ids=(end, 95))
    ending_text = new_tokens(ending, PROMPTS[:1])[0]
    assert ending_text[3:] == [end] * (NEW - 3)
    assert new_tokens(ending, PROMPTS[:1], eos_token_ids=()) == new_tokens(model, PROMPTS[:1])


def test_decoding_stops_when_all_have_ended(model):
    steps = []

    class Counted(LlamaForCausalLM):
        def extend(self, tokens, lengths, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().extend(tokens, lengths, cache)

    free = new_tokens(model, PROMPTS[:1])[0]
    generate(make_model(cls=Counted), PROMPTS[:1], max_new_tokens=40, eos_token_ids=free[5])
    jax.effects_barrier()
    assert len(steps) == free.index(free[5])


def test_one_token_needs_no_decoding(model):
    output = generate(model, PROMPTS[:1], max_new_tokens=1)
    assert output.sequences[0, -1] == new_tokens(model, PROMPTS[:1])[0][0]
    assert output.lengths.tolist() == [1]


SAMPLED = {"temperature": 0.8, "top_p": 0.95, "key": jax.random.key(5)}


def test_text_depends_on_prompt_and_key_only(model):
    alone = new_tokens(model, PROMPTS[:1], **SAMPLED)[0]
    others = [[9, 8, 7, 6, 5, 4, 3], [1]]
    assert new_tokens(model, [*others, PROMPTS[0]], **SAMPLED)[2] == alone
    assert new_tokens(model, [PROMPTS[0], *others], "right", **SAMPLED)[0] == alone
    assert new_tokens(model, [PROMPTS[0], others[0], PROMPTS[0]], **SAMPLED)[2] == alone
    assert new_tokens(model, PROMPTS[:1], **{**SAMPLED, "key": jax.random.key(6)})[0] != alone
    assert new_tokens(model, PROMPTS[:1])[0] != alone


def test_each_sequence_may_have_its_key(model):
    keys = jax.random.split(jax.random.key(0), 3)
    texts = new_tokens(model, [PROMPTS[0]] * 3, **{**SAMPLED, "key": keys})
    assert len(set(map(tuple, texts))) == 3
    assert texts[1] == new_tokens(model, PROMPTS[:1], **{**SAMPLED, "key": keys[1]})[0]


def test_old_style_keys_are_the_same_keys(model):
    old = new_tokens(model, PROMPTS[:1], **{**SAMPLED, "key": jax.random.PRNGKey(5)})
    assert old == new_tokens(model, PROMPTS[:1], **SAMPLED)


def test_text_made_in_two_calls_is_that_of_one(model):
    whole = new_tokens(model, PROMPTS[:1], **SAMPLED)[0]
    second = new_tokens(model, [PROMPTS[0] + whole[:5]], max_new_tokens=NEW - 5, **SAMPLED)[0]
    assert second == whole[5:]


def test_repetition_penalty_counts_prompt_and_new_tokens_but_not_padding(model):
    expected = greedy_by_full_forward(model, PROMPTS, NEW, penalty=1.5)
    assert expected != new_tokens(model, PROMPTS)
    # Padding ids that would change the choice if they counted as seen.
    assert new_tokens(model, PROMPTS, "left", fill=expected[1][0], repetition_penalty=1.5) == expected


def test_the_second_call_compiles_nothing(model, caplog):
    ids, mask = padded(PROMPTS, "left")
    options = {"temperature": 0.9, "top_k": 20, "key": jax.random.key(0), "repetition_penalty": 1.1}
    with jax.log_compiles():
        generate(model, ids, attention_mask=mask, max_new_tokens=NEW, **options)
        assert any("decode" in message for message in compilations(caplog))
        caplog.clear()
        changed = {"temperature": 0.3, "top_k": 5, "key": jax.random.key(1), "repetition_penalty": 1.3}
        generate(model, ids[:, ::-1], attention_mask=mask[:, ::-1], max_new_tokens=NEW, **changed)
        assert compilations(caplog) == []


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("kind", ["loaded", "abstract", "converted"])
def test_what_was_compiled_ahead_is_not_compiled_again(kind, tmp_path, caplog):
    folder = tmp_path / "model"
    if kind == "loaded":
        model = described = make_model("fireq")
    else:
        if kind == "converted":
            make_model("fireq").save(folder)
        else:
            write_checkpoint(folder, config_of("mha_tied", vocab_size=VOCAB), std=0.1)
        described = LlamaForCausalLM.abstract(StoredModel.open(folder))
        model = LlamaForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": NEW, "temperature": 0.9, "key": jax.random.key(0)}
    prompts = [[5] * 3] * 7  # a batch that no other test has
    with jax.log_compiles():
        warmup(described, prompts, **options, only_prefill=True)
        assert programs(caplog) == {"prefill"}
        caplog.clear()
        warmup(described, prompts, **options)
        assert programs(caplog) == {"decode"}
        caplog.clear()
        generate(model, prompts, **options)
        assert programs(caplog) == set()


@pytest.mark.usefixtures("nothing_kept")
def test_nearby_lengths_share_a_compilation(model, caplog):
    generate(model, [[1, 2, 3]], max_new_tokens=5)
    with jax.log_compiles():
        generate(model, [[1, 2, 3, 4, 5, 6]], max_new_tokens=BUCKET - 6)
        assert compilations(caplog) == []
        generate(model, [[1, 2, 3, 4, 5, 6]], max_new_tokens=BUCKET - 5)
        assert programs(caplog) == {"prefill", "decode"}
        assert len(compilations(caplog)) == 2


def test_rounded_lengths_are_few_and_near():
    lengths = np.arange(1, 131073)
    rounded = np.array([round_up(int(length)) for length in lengths])
    assert (rounded >= lengths).all()
    assert (rounded % BUCKET == 0).all()
    assert (rounded < lengths + BUCKET)[lengths <= 1024].all()
    assert (rounded[lengths > 1024] < 1.125 * lengths[lengths > 1024]).all()
    assert len(np.unique(rounded)) == 16 + 7 * 8


def test_the_cache_is_donated(model):
    request = prepare(model, PROMPTS[:1], None, 4)
    arrays, structure = jax.tree.flatten(model)

    choice, static = request.choice, request.static
    cache, progress = prefill(structure, arrays, request.tokens, request.lengths, choice, request.capacity, static)
    kept, *_ = decode(structure, arrays, cache, progress, choice, 3, static)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((kept, arrays)))


@pytest.mark.parametrize("glance", [0.0, math.inf], ids=["one token a call", "ever more"])
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_stream_is_generate_step_by_step(model, options, glance, monkeypatch):
    monkeypatch.setattr(sys.modules[stream.__module__], "GLANCE", glance)
    free = new_tokens(model, PROMPTS, **options)
    ids, mask = padded(PROMPTS, "left")
    options = {**options, "max_new_tokens": NEW, "eos_token_ids": (free[0][4], free[2][7])}
    output = generate(model, ids, attention_mask=mask, **options)
    steps = list(stream(model, ids, attention_mask=mask, **options))
    assert len(steps) == output.lengths.max()
    assert len(set(output.lengths.tolist())) > 1
    tokens, active = (np.stack(parts, axis=1) for parts in zip(*(step[:2] for step in steps), strict=True))
    np.testing.assert_array_equal(tokens, output.sequences[:, ids.shape[1] :][:, : len(steps)])
    np.testing.assert_array_equal(active.sum(axis=1), output.lengths)


def test_streaming_asks_for_as_many_tokens_as_come_at_a_glance():
    def asked(seconds_a_token, calls=12):
        counts = [1]
        for _ in range(calls):
            # What a call costs by itself, and each token.
            counts.append(_next_count(counts[-1], 0.005 + counts[-1] * seconds_a_token))
        return counts

    assert asked(0.002)[-1] == 32
    assert asked(0.03)[-1] == 2
    assert asked(2.0) == [1] * 13
    assert _next_count(32, 2 * GLANCE) == 16


def test_streaming_runs_the_program_of_generate(model, caplog):
    # Another program may round otherwise, and then choose other tokens.
    with jax.log_compiles():
        generate(model, [[5] * 3] * 4, max_new_tokens=NEW)
        assert any("decode" in message for message in compilations(caplog))
        caplog.clear()
        assert len(list(stream(model, [[5] * 3] * 4, max_new_tokens=NEW))) == NEW
        assert compilations(caplog) == []


def test_cache_capacity_is_exact(model):
    exact = new_tokens(model, PROMPTS, cache_capacity=5 + NEW)
    assert exact == new_tokens(model, PROMPTS)
    with pytest.raises(ValueError, match=r"5 tokens and max_new_tokens is 12, together 17; cache_capacity is 16"):
        new_tokens(model, PROMPTS, cache_capacity=4 + NEW)


def test_more_tokens_than_positions_are_warned_of(caplog):
    short = make_model(max_position_embeddings=8)
    assert len(generate(short, [[1, 2, 3]], max_new_tokens=5).sequences[0]) == 8
    assert not caplog.records
    assert len(generate(short, [[1, 2, 3]], max_new_tokens=6).sequences[0]) == 9
    assert "3 tokens and 6 new ones exceed the model's 8 positions" in caplog.text


BAD_CALLS = {
    "no tokens": ([[]], None, {}, r"shape \(1, 0\); expected prompts of at least one token"),
    "no prompts": (np.zeros((0, 4), int), None, {}, r"shape \(0, 4\); expected prompts"),
    "one dimension": ([1, 2], None, {}, r"int64 \(2,\); expected integers \[batch, tokens\]"),
    "fractions": ([[1.5]], None, {}, r"float64 \(1, 1\); expected integers"),
    "id too large": ([[1, VOCAB]], None, {}, r"holds \[97\]; expected ids from 0 to 96"),
    "negative id": ([[-1, 3]], None, {}, r"holds \[-1\]; expected ids from 0 to 96"),
    "mask shape": ([[1, 2]], [[1]], {}, r"mask has shape \(1, 1\); expected that of input_ids, \(1, 2\)"),
    "mask values": ([[1, 2]], [[1, 2]], {}, r"values \[1 2\]; expected 0 and 1"),
    "empty row": ([[1, 2], [3, 4]], [[1, 1], [0, 0]], {}, r"0 throughout rows \[1\]"),
    "no new tokens": ([[1]], None, {"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number"),
    "half a token": ([[1]], None, {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
    "ragged": ([[1, 2], [3]], None, {}, "input_ids has rows of different lengths; pad them"),
    "ragged mask": ([[1, 2], [3, 4]], [[1], [1, 1]], {}, "attention_mask has rows of different lengths"),
    "too many tokens": (
        [[1]],
        None,
        {"max_new_tokens": 3_000_000_000},
        "max_new_tokens is 3000000000; expected at most",
    ),
    "temperatures": ([[1]], None, {"temperature": jnp.array([0.5, 0.7])}, "temperature is .* expected a finite number"),
    "eos": ([[1]], None, {"eos_token_ids": [3, 200]}, r"eos_token_ids is \[3, 200\]; expected ids from 0 to 96"),
    "half an eos": ([[1]], None, {"eos_token_ids": 50.9}, "eos_token_ids is 50.9; expected ids"),
    "an eos in words": ([[1]], None, {"eos_token_ids": "26"}, "eos_token_ids is '26'; expected ids"),
    "padding": ([[1]], None, {"pad_token_id": -1}, "pad_token_id is -1; expected ids from 0 to 96"),
    "capacity": ([[1]], None, {"cache_capacity": 64.0}, "cache_capacity is 64.0; expected a whole number"),
    "malformed key": ([[1]], None, {"temperature": 1.0, "key": jnp.array(3)}, "expected jax.random.key"),
    "temperature": ([[1]], None, {"temperature": -1.0}, "temperature is -1.0; expected 0"),
    "key": ([[1]], None, {"temperature": 1.0, "key": 3}, "key is 3; expected jax.random.key"),
    "keys": (
        [[1]],
        None,
        {"top_k": 2, "key": jax.random.split(jax.random.key(0), 2)},
        r"shape \(2,\); expected \(\) or",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_quote_what_was_given(model, case):
    ids, mask, options, message = BAD_CALLS[case]
    for function in (generate, stream, check_call):
        with pytest.raises(ValueError, match=message):
            function(model, ids, attention_mask=mask, **{"max_new_tokens": 4, **options})


def test_unknown_options_are_errors(model):
    with pytest.raises(TypeError, match="topp"):
        generate(model, [[1]], max_new_tokens=4, topp=0.9)


@pytest.mark.parametrize("function", [generate, stream, warmup])
def test_the_number_of_new_tokens_is_no_option(model, function):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) missing .*'max_new_tokens'"):
        function(model, [[1]])
