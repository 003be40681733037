"""Options that transformers has too, against its ``generate`` on the same tiny Llama, and what they return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import config_of, write_folder

from fireq_jax import LlamaForCausalLM, ModelConfig, generate, recipes
from fireq_jax.generation import TextStream, stream
from fireq_jax.generation.constraints import constrain, constraints_of
from fireq_jax.generation.likelihood import token_logprobs
from fireq_jax.generation.request import prepare

BYTES = byte_tokenizer()
PROMPTS = np.array([[71, 101, 110, 101], [80, 72, 33, 200]])
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "llama", config_of("gqa", vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def model(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' ``generate`` of the two prompts; its result with scores."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.generation_config.pad_token_id = 0

    def run(**options):
        with torch.no_grad():
            return reference.generate(
                torch.tensor(PROMPTS), attention_mask=torch.ones(PROMPTS.shape), do_sample=False,
                max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **options,
            )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def free(model) -> list[list[int]]:
    """New tokens without any option."""
    return generate(model, PROMPTS, max_new_tokens=NEW).sequences[:, PROMPTS.shape[1] :].tolist()


def assert_same(output, reference) -> None:
    expected = reference.sequences.numpy()
    found = np.asarray(output.sequences)
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == 0).all()


def test_constraints_are_those_of_transformers(model, theirs, free):
    """Alone and together; those of one call share its programs with others that have the same on."""
    end = free[0][3]
    cases = [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[free[0][0]], [free[1][1], free[1][2]], free[1][4:7], [end]]},
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[free[0][0]]], "min_new_tokens": 6},
    ]
    texts = set()
    for case in cases:
        output = generate(model, PROMPTS, max_new_tokens=NEW, eos_token_ids=end, pad_token_id=0, **case)
        assert_same(output, theirs(eos_token_id=end, **case))
        texts.add(np.asarray(output.sequences).tobytes())
    assert len(texts) == len(cases)


def test_logits_processors_see_the_tokens_so_far(model, theirs):
    torch = pytest.importorskip("torch")

    def forward_only(tokens, logits):
        """No token but larger ids than the last one's, which is at the end of the row."""
        last = jnp.max(jnp.where(tokens >= 0, jnp.arange(tokens.shape[1]), 0), axis=1)
        last = jnp.take_along_axis(tokens, last[:, None], axis=1)
        return jnp.where(jnp.arange(logits.shape[1])[None] > last, logits, logits - 5.0)

    def halved(tokens, logits):
        return logits / 2

    def reference(tokens, scores):
        return torch.where(torch.arange(scores.shape[1])[None] > tokens[:, -1:], scores, scores - 5.0) / 2

    options = {"repetition_penalty": 1.2, "logits_processor": [forward_only, halved]}
    output = generate(model, PROMPTS, max_new_tokens=NEW, pad_token_id=0, **options)
    assert_same(output, theirs(repetition_penalty=1.2, logits_processor=[reference]))
    with pytest.raises(ValueError, match=r"lambda.* returned shape \(2,\); expected the logits', \(2, 258\)"):
        generate(model, PROMPTS, max_new_tokens=NEW, logits_processor=[lambda tokens, logits: logits[:, 0]])


def test_log_probabilities_are_of_the_model_s_own_distribution(model, theirs, free):
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.2, "eos_token_ids": free[0][3], "pad_token_id": 0}
    output = generate(model, PROMPTS, top_logprobs=3, **options)
    reference = theirs(repetition_penalty=1.2, eos_token_id=free[0][3])
    assert_same(output, reference)
    every = np.stack([step.log_softmax(-1).numpy() for step in reference.logits], axis=1)
    made = np.arange(NEW) < np.asarray(output.lengths)[:, None]
    assert not made.all()
    for row, step in np.argwhere(made):
        token = output.sequences[row, PROMPTS.shape[1] + step]
        np.testing.assert_allclose(output.logprobs[row, step], every[row, step, token], rtol=1e-3, atol=1e-4)
        best = np.argsort(-every[row, step])[:3]
        np.testing.assert_array_equal(output.top_tokens[row, step], best)
        np.testing.assert_allclose(output.top_logprobs[row, step], every[row, step, best], rtol=1e-3, atol=1e-4)
    assert not np.asarray(output.logprobs)[~made].any()
    assert not np.asarray(output.top_logprobs)[~made].any()
    # The same numbers from the texts as they are, padded on either side, and step by step.
    width = output.sequences.shape[1]
    mask = np.arange(width) < PROMPTS.shape[1] + np.asarray(output.lengths)[:, None]
    scored = np.asarray(token_logprobs(model, output.sequences, mask))
    np.testing.assert_allclose(scored[:, PROMPTS.shape[1] - 1 :], output.logprobs, rtol=1e-3, atol=1e-4)
    turned = token_logprobs(model, np.asarray(output.sequences)[:, ::-1], mask[:, ::-1])
    assert turned.shape == (2, width - 1)
    shifted = token_logprobs(model, np.roll(output.sequences, 2, axis=1)[:1], np.roll(mask, 2, axis=1)[:1] & True)
    np.testing.assert_allclose(shifted[0, 2:], scored[0, :-2], rtol=1e-3, atol=1e-4)
    steps = list(stream(model, PROMPTS, top_logprobs=3, **options))
    for name in ("logprobs", "top_logprobs", "top_tokens"):
        found = np.stack([getattr(step, name) for step in steps], axis=1)
        np.testing.assert_array_equal(found, np.asarray(getattr(output, name))[:, : len(steps)])
    plain = generate(model, PROMPTS, logprobs=True, **options)
    np.testing.assert_array_equal(plain.logprobs, output.logprobs)
    assert plain.top_logprobs is None


@pytest.mark.parametrize("ids", [[[5]], [[1, 300]]])
def test_scored_tokens_are_checked(model, ids):
    with pytest.raises(ValueError, match=r"shape \(1, 1\); expected at least two|holds \[300\]; expected ids"):
        token_logprobs(model, ids)


def test_stop_strings_end_a_sequence_where_transformers_does(model, theirs):
    """After the token that completes one, and with it; in generate and in stream."""
    # Letters alone: half of a random model's other bytes are no text.
    options = {"bad_words_ids": [[token] for token in range(VOCABULARY) if not 34 <= token < 60]}
    free = np.asarray(generate(model, PROMPTS, max_new_tokens=NEW, **options).sequences)[:, PROMPTS.shape[1] :]
    words = [BYTES.decode(free[0][3:5]), BYTES.decode(free[1][6:9]), "not there"]
    options |= {"stop_strings": words, "tokenizer": BYTES}
    output = generate(model, PROMPTS, max_new_tokens=NEW, pad_token_id=0, logprobs=True, **options)
    # transformers pads what has ended only where there is an EOS id.
    assert_same(output, theirs(eos_token_id=1, **options))
    assert output.finished.all()
    assert (output.lengths < NEW).all()
    assert not np.asarray(output.logprobs)[np.arange(NEW) >= np.asarray(output.lengths)[:, None]].any()
    steps = list(stream(model, PROMPTS, max_new_tokens=NEW, pad_token_id=0, **options))
    np.testing.assert_array_equal(sum(step.active for step in steps), output.lengths)
    # A special token has no text; it ends a sequence as an EOS id does.
    request = prepare(model, PROMPTS, None, NEW, stop_strings=["</s>", "a"], tokenizer=BYTES, eos_token_ids=7)
    assert (request.choice.eos.tolist(), request.stop.strings) == ([7, 1], ("a",))


def test_return_sequences_draw_each_for_itself(model):
    options = {"temperature": 1.0, "max_new_tokens": NEW}
    key = jax.random.key(3)
    output = generate(model, PROMPTS, num_return_sequences=3, key=key, **options)
    rows = output.sequences.tolist()
    assert [row[:4] for row in rows] == np.repeat(PROMPTS, 3, axis=0).tolist()
    assert len(set(map(tuple, rows))) == 6
    again = generate(model, PROMPTS[1:], key=jax.random.fold_in(key, 2), **options)
    assert again.sequences[0].tolist() == rows[5]


def test_options_that_change_values_alone_compile_nothing(model, caplog):
    def call(seed, size, least, words):
        return generate(
            model, PROMPTS, max_new_tokens=NEW, temperature=0.5 + seed, key=jax.random.key(seed), top_logprobs=2,
            num_return_sequences=2, no_repeat_ngram_size=size, min_new_tokens=least, bad_words_ids=words,
            eos_token_ids=9, stop_strings=["zz"], tokenizer=BYTES,
        )  # fmt: skip

    call(1, 2, 3, [[5, 6, 7], [8], [9, 1]])
    with jax.log_compiles():
        call(2, 3, 4, [[5, 6], [8, 8, 8, 8], [4], [3]])
    assert [record for record in caplog.records if record.getMessage().startswith("Compiling")] == []


@pytest.fixture(scope="module")
def quantized() -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_layers": 1}
    config = ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=16)
    model = LlamaForCausalLM(config, recipes.rtn(), dtype=jnp.float32)
    model.lm_head.set_value(model.lm_head.get_value() * 20)
    return model


@pytest.mark.parametrize("kind", ["model", "quantized"])
def test_a_further_turn_computes_only_what_is_new(kind, request):
    """Rows of different lengths, one ended by an EOS id, one by a stop string inside a call's tokens."""
    model = request.getfixturevalue(kind)
    ids, mask = np.array([[0, 0, 71, 101, 110], [80, 72, 33, 200, 9]]), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    letters = [[token] for token in range(VOCABULARY) if not 34 <= token < 60]
    options = {"max_new_tokens": NEW, "bad_words_ids": letters, "eos_token_ids": 0, "cache_capacity": 5 + NEW}
    free = np.asarray(generate(model, ids, mask, **options).sequences)[:, 5:]
    options |= {"eos_token_ids": int(free[0][3]), "stop_strings": [BYTES.decode(free[1][5:7])], "tokenizer": BYTES}
    output = generate(model, ids, mask, return_cache=True, **options)
    used, lengths = mask.sum(axis=1), np.asarray(output.lengths)
    assert output.cache.lengths.tolist() == (used + lengths - 1).tolist()
    assert (lengths < NEW).all()
    steps = stream(model, ids, mask, **options)
    assert len(list(steps)) == lengths.max()
    assert steps.cache.lengths.tolist() == output.cache.lengths.tolist()
    made = np.arange(NEW) < lengths[:, None]
    said = np.concatenate([np.asarray(output.sequences), np.full((2, 3), 41)], axis=1)
    there = np.concatenate([mask, made, np.ones((2, 3), int)], axis=1).astype(int)
    further = {"max_new_tokens": 8, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    expected = generate(model, said, there, logprobs=True, **further)
    assert output.cache.capacity == 17
    for cache in (output.cache, steps.cache, output.cache.cut([4, 99])):
        again = generate(model, said, there, logprobs=True, cache=cache, **further)
        np.testing.assert_allclose(again.logprobs[:, 0], expected.logprobs[:, 0], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(again.sequences, expected.sequences)
    assert not output.cache.lengths.is_deleted()


def test_a_cache_of_another_call_is_refused(model, quantized):
    cache = generate(model, PROMPTS, max_new_tokens=2, return_cache=True).cache
    longer = np.concatenate([PROMPTS, PROMPTS], axis=1)
    for call, message in (
        (
            (model, longer[:1], {}),
            r"2 layers with keys in format 'none', float32\[2, 2, 64, 12\]; expected .* for 1 prompts",
        ),
        ((quantized, longer, {}), "cache is of 2 sequences"),
        ((model, PROMPTS, {}), "holds 5 tokens of sequence 0, and the prompt has 4; expected a longer prompt"),
        ((model, longer, {"cache_capacity": 20}), "cache_capacity is 20; expected at least the cache's, 64"),
        ((model, longer, {"num_return_sequences": 2, "top_k": 4}), "num_return_sequences is 2, and there is a cache"),
        ((model, longer, {"cache": 3}), "cache is a int; expected the KVCache of an earlier call"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*call[:2], max_new_tokens=4, **{"cache": cache, **call[2]})
    for lengths in ([1], [1, -1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected 2 whole numbers"):
            cache.cut(lengths)


BAD_OPTIONS = {
    "fewest tokens": ({"min_new_tokens": -1}, "min_new_tokens is -1; expected a whole number"),
    "ngrams": ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5; expected a whole number"),
    "no word": ({"bad_words_ids": [[]]}, r"bad_words_ids has \[\]; expected lists of ids from 0 to 257"),
    "word": ({"bad_words_ids": [[5, 258]]}, r"bad_words_ids has \[5, 258\]; expected lists"),
    "no words": ({"bad_words_ids": 5}, "bad_words_ids is 5; expected lists of ids"),
    "nested words": ({"bad_words_ids": [[[1], [2, 3]]]}, r"bad_words_ids has \[\[1\], \[2, 3\]\]; expected lists"),
    "array of words": ({"bad_words_ids": jnp.full((1, 2), 258)}, r"bad_words_ids has \[258, 258\]; expected lists"),
    "cache or not": ({"return_cache": "no"}, "return_cache is 'no'; expected True or False"),
    "flat words": ({"bad_words_ids": [5]}, "bad_words_ids has 5; expected lists"),
    "copies": ({"num_return_sequences": 0, "top_k": 3}, "num_return_sequences is 0; expected"),
    "equal copies": ({"num_return_sequences": 2}, "num_return_sequences is 2, and all would be equal"),
    "logprobs": ({"logprobs": 5}, "logprobs is 5; expected True or False: top_logprobs"),
    "top": ({"top_logprobs": 0}, "top_logprobs is 0; expected"),
    "more than all": ({"top_logprobs": 259}, "top_logprobs is 259; expected at most 258"),
    "processor": ({"logits_processor": max}, "logits_processor is <built-in function max>; expected a list"),
    "stop": ({"stop_strings": [""], "tokenizer": BYTES}, r"stop_strings is \[''\]; expected a text"),
    "no tokenizer": ({"stop_strings": "a"}, "stop_strings is 'a', and there is no tokenizer"),
    "mixed": ({"stop_strings": "</s>\n", "tokenizer": BYTES}, r"has '</s>\\n'; expected '</s>' alone"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_quoted(model, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, max_new_tokens=NEW, **options)


def banned_by_hand(tokens: list[int], ngram: int, words: list[list[int]], eos: list[int], least: int) -> set[int]:
    """What may not follow ``tokens``, as the options' words say."""
    ends = [tokens[i + ngram - 1] for i in range(len(tokens) - ngram + 1)
            if ngram and tokens[i : i + ngram - 1] == tokens[len(tokens) - ngram + 1 :]]  # fmt: skip
    words = [word for word in words if len(word) > 1 or word[0] not in eos]
    completed = [word[-1] for word in words if tokens[max(0, len(tokens) - len(word) + 1) :] == word[:-1]]
    return {*ends, *completed, *(eos if len(tokens) < least else ())}


few = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(few, min_size=1, max_size=8), min_size=2, max_size=2),
    ngram=st.integers(0, 4),
    words=st.lists(st.lists(few, min_size=1, max_size=4), max_size=4),
    eos=st.lists(few, max_size=1),
    least=st.integers(0, 8),
)
def test_constraints_ban_what_their_words_say(rows, ngram, words, eos, least):
    lengths = np.array([len(row) for row in rows], np.int32)
    history = np.array([row + [-1] * (8 - len(row)) for row in rows], np.int32)
    constraints = constraints_of(
        np.zeros(2, np.int32), eos, 4, min_new_tokens=least, no_repeat_ngram_size=ngram, bad_words_ids=words
    )
    assert (constraints.ngram is None) == (ngram == 0)
    assert (constraints.eos is None) == (least == 0 or not eos)
    logits = np.asarray(constrain(jnp.zeros((2, 4)), constraints, history, lengths))
    for row, tokens in enumerate(rows):
        found = set(np.flatnonzero(logits[row] == -np.inf).tolist())
        assert found == banned_by_hand(tokens, ngram, words, eos, least)


@settings(max_examples=100, deadline=None)
@given(text=st.text("abé", max_size=12), stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string_and_is_held_back_no_longer(text, stops):
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    shown, stream = "", TextStream(BYTES, [], stops)
    for token in BYTES(text).input_ids:
        shown += stream.push(token)
        if stream.stopped:
            break
        decoded = shown + stream._held
        assert not any(stop in decoded for stop in stops)
        assert stream._held == "" or any(stop.startswith(stream._held) for stop in stops)
    shown += stream.finish()
    assert stream.stopped == bool(places)
    # What completes first ends the text, and of those that one token completes the one that begins first.
    if places:
        ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
        first = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
        assert shown == text[: min(first)]
    else:
        assert shown == text
