"""``fireq-generate``: continue prompts, or answer them, on the command line."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np

from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.checkpoints.huggingface import read_generation_config
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import exit_code
from fireq_jax.compilation import keep_programs
from fireq_jax.generation.generate import check_call, compile_ahead, generate, stream
from fireq_jax.generation.sampling import SamplingConfig, SamplingOptions
from fireq_jax.models.llama import CausalLM
from pallas_kernels import formats
from pallas_kernels.dispatch import Implementation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 128
# Tokens of the prompt that the first new token is decoded after; many tokenizers drop a text's first space.
_CONTEXT = 8
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What transformers' generation configs may also say, and what says nothing there.
_WITHOUT_EFFECT: dict[str, Any] = {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "penalty_alpha": 0.0, "guidance_scale": 1.0, "bad_words_ids": [],
    "suppress_tokens": [], "begin_suppress_tokens": [], "forced_bos_token_id": None, "forced_eos_token_id": None,
    "sequence_bias": {}, "stop_strings": [],
}  # fmt: skip
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    arguments = _parser().parse_args(argv)
    return exit_code("fireq-generate", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fireq-generate",
        description="Continue prompts with a Hugging Face or converted Llama. New text goes to stdout, speed to "
        "stderr. What is not given comes from generation_config.json in the model's folder, if it is there.",
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="Hugging Face checkpoint or converted model")
    add("--prompt", required=True, action="append", metavar="TEXT", help="repeat it for a batch, printed when complete")
    add("--max-new-tokens", type=int, metavar="N", help=f"default {DEFAULT_NEW_TOKENS}")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token: the default without filters")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 turns it off")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens that hold probability P")
    add("--min-p", type=float, metavar="P", help="sample from tokens at least P times as likely as the best")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens that are there already less likely")
    add("--seed", type=int, default=0, help="of the sampling, the same for every prompt; default 0")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the tokenizer's chat template")
    add("--system", metavar="TEXT", help="system message; with --chat")
    add("--no-stream", action="store_true", help="print text when it is complete")
    add("--json", action="store_true", help="print a JSON list with prompt, text, tokens and finished")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is not quantized")
    add("--kv-format", choices=get_args(formats.KVFormat), help="of the cache, in place of the model's own")
    add("--implementation", choices=get_args(Implementation), default="auto", help="of the ops; default auto")
    add("--no-verify", dest="verify", action="store_false", help="take a converted model's files as they are")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is given without --chat")
    # Before the model: bad options should not cost the minutes of loading one.
    defaults = read_generation_config(arguments.model)
    sampling = sampling_options(
        defaults, {name: getattr(arguments, name) for name in (*_SAMPLING, "repetition_penalty")}
    )
    SamplingConfig(**sampling)
    try:
        key = jax.random.key(arguments.seed)
    except OverflowError as error:
        raise ValueError(f"--seed is {arguments.seed}; expected a number of 64 bits") from error
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = defaults.get("max_new_tokens")
    if max_new_tokens is None:
        max_new_tokens = DEFAULT_NEW_TOKENS
    tokenizer = load_tokenizer(arguments.model, verify=arguments.verify)
    prompts = [_encode(tokenizer, text, arguments) for text in arguments.prompt]
    width = max(map(len, prompts))
    options = {
        "input_ids": [prompt + [0] * (width - len(prompt)) for prompt in prompts],
        "attention_mask": [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
        "eos_token_ids": defaults.get("eos_token_id"),
        "key": key,
        **sampling,
    }
    streaming = len(prompts) == 1 and not (arguments.no_stream or arguments.json)
    model = _load(arguments, options, only_prefill=streaming)
    if streaming:
        _stream(model, tokenizer, prompts[0], options)
    else:
        _print_complete(model, tokenizer, prompts, options, arguments)


def _load(arguments: argparse.Namespace, options: dict[str, Any], *, only_prefill: bool) -> CausalLM:
    """The model; what generation will run is compiled while it is read."""
    begin = time.perf_counter()
    keep_programs()
    stored = StoredModel.open(arguments.model, verify=arguments.verify)
    kinds = {name: getattr(arguments, name) for name in ("dtype", "kv_format", "implementation")}
    abstract = CausalLM.abstract(stored, **kinds)
    check_call(abstract, **options)
    with ThreadPoolExecutor() as pool:
        model = pool.submit(abstract.filled, stored)
        compile_ahead(abstract, **options, only_prefill=only_prefill)
        loaded = model.result()
    part = " the prompt" if only_prefill else ""
    print(f"{arguments.model}: read, and compiled for{part}, in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return loaded


def sampling_options(defaults: dict[str, Any], given: dict[str, Any]) -> SamplingOptions:
    """Options ``given`` (None: not given), then those of a generation config.

    As in transformers, ``do_sample`` decides whether the config's filters and temperature hold, ``top_k``
    is 50 where it does not say, and 0 means none.
    """
    if ignored := sorted(name for name, plain in _WITHOUT_EFFECT.items() if defaults.get(name) not in (None, plain)):
        logger.warning("generation_config.json: %s: without effect here", ", ".join(ignored))
    options = {"repetition_penalty": defaults.get("repetition_penalty")}
    if defaults.get("do_sample"):
        stated = {name: value for name in _SAMPLING if (value := defaults.get(name)) is not None}
        options |= {"temperature": 1.0, "top_k": 50, **stated}
    options |= {name: value for name, value in given.items() if value is not None}
    if options.get("top_k") == 0:
        options["top_k"] = None
    return SamplingOptions(**options)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, arguments: argparse.Namespace) -> list[int]:
    if arguments.chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {arguments.model} has no chat template; leave out --chat")
        messages = [{"role": "user", "content": text}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        text = _apply_chat_template(tokenizer, messages)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt {text!r} is no Unicode text: {error}") from error
    ids = tokenizer(text, add_special_tokens=not arguments.chat).input_ids
    if not ids:
        raise ValueError(f"prompt {text!r} has no tokens; expected at least one")
    return ids


def _apply_chat_template(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template rejects the messages: {error}") from error
    assert isinstance(text, str)
    return text


def pieces(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text of each new token; "" while a character is incomplete, one more piece at the end.

    Only the tokens since the last complete piece, and that piece for context, are decoded again.
    """

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    ids, width = list(prompt), _CONTEXT
    # Of a character that the cut splits, byte-fallback decoders spoil the whole run of bytes that follows.
    while width < len(ids) and decode(ids[-width:]).startswith("\N{REPLACEMENT CHARACTER}"):
        width *= 2
    ids = ids[-width:]
    context, done = 0, len(ids)
    for token in tokens:
        ids.append(token)
        before, text = decode(ids[context:done]), decode(ids[context:])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
            continue
        yield text[len(before) :]
        # What leaves no text, a special token, is no context: after nothing a first space would be dropped.
        context, done = (done if len(text) > len(before) else context), len(ids)
    yield decode(ids[context:])[len(decode(ids[context:done])) :]


def _stream(model: CausalLM, tokenizer: "PreTrainedTokenizerBase", prompt: list[int], options: dict[str, Any]) -> None:
    times = [time.perf_counter()]

    def tokens() -> Iterator[int]:
        for step in stream(model, **options):
            times.append(time.perf_counter())
            yield int(step.tokens[0])

    for piece in pieces(tokenizer, prompt, tokens()):
        print(piece, end="", flush=True)
    print()
    count = len(times) - 1
    speed = f"first after {times[1] - times[0]:.2f} s"
    if count > 2:
        # The second waits for the decoding step's compilation.
        speed += f", second after {times[2] - times[1]:.2f} s, then {(count - 2) / (times[-1] - times[2]):.1f} tokens/s"
    _report(len(prompt), count, times[-1] - times[0], speed)


def _print_complete(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    start = time.perf_counter()
    sequences, lengths, finished = map(np.asarray, generate(model, **options))
    seconds = time.perf_counter() - start
    width = sequences.shape[1] - options["max_new_tokens"]
    results = [
        {
            "prompt": text,
            "text": "".join(pieces(tokenizer, prompt, iter(sequence[width : width + length].tolist()))),
            "tokens": int(length),
            "finished": bool(end),
        }
        for text, prompt, sequence, length, end in zip(
            arguments.prompt, prompts, sequences, lengths, finished, strict=True
        )
    ]
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        for result in results:
            print(f"=== {result['prompt']}\n{result['text']}" if len(results) > 1 else result["text"])
    count = int(lengths.sum())
    _report(sum(map(len, prompts)), count, seconds, f"{count / seconds:.1f} tokens/s")


def _report(prompt_tokens: int, count: int, seconds: float, speed: str) -> None:
    print(f"{prompt_tokens} prompt tokens, {count} new ones in {seconds:.2f} s ({speed})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
