"""``fireq-generate``: continue prompts, or answer them, on the command line."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import jax
import numpy as np

from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.checkpoints.hub import check_config, resolve_model
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import add_verbosity, exit_code, leave
from fireq_jax.compilation import keep_programs
from fireq_jax.generation import chat
from fireq_jax.generation.defaults import SAMPLING, GenerationDefaults
from fireq_jax.generation.generate import check_call, generate, stream, warmup
from fireq_jax.generation.sampling import SamplingConfig
from fireq_jax.generation.text import TextStream
from fireq_jax.models.llama import CausalLM
from pallas_kernels import formats
from pallas_kernels.dispatch import Implementation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 128
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    arguments = _parser().parse_args(argv)
    return exit_code("fireq-generate", lambda: _run(arguments), arguments.log_level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fireq-generate",
        description="Continue prompts with a Hugging Face or converted Llama. New text goes to stdout, speed to "
        "stderr. What is not given comes from generation_config.json in the model's folder, if it is there.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a model's folder or GGUF file, or a hub id to download")
    add("--revision", help="branch, tag or commit of the hub id")
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
    add_verbosity(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is given without --chat")
    # Before the model: bad options should not cost the minutes of loading one.
    given = {name: getattr(arguments, name) for name in (*SAMPLING, "repetition_penalty")}
    SamplingConfig(**GenerationDefaults(Path()).sampling(given))
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}; expected at least 1")
    try:
        key = jax.random.key(arguments.seed)
    except OverflowError as error:
        raise ValueError(f"--seed is {arguments.seed}; expected a number of 64 bits") from error
    folder = resolve_model(arguments.model, arguments.revision, check=_check)
    defaults = GenerationDefaults.read(folder)
    if defaults.ignored:
        logger.warning("%s: %s: without effect here", defaults.path, ", ".join(defaults.ignored))
    tokenizer = load_tokenizer(folder, verify=arguments.verify)
    prompts = [_encode(tokenizer, text, arguments) for text in arguments.prompt]
    width = max(map(len, prompts))
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = defaults.new_tokens(width) or DEFAULT_NEW_TOKENS
    options = {
        "input_ids": [prompt + [0] * (width - len(prompt)) for prompt in prompts],
        "attention_mask": [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
        "eos_token_ids": defaults.eos_token_id,
        "key": key,
        **defaults.sampling(given),
    }
    streaming = len(prompts) == 1 and not (arguments.no_stream or arguments.json)
    model = _load(folder, defaults, arguments, options, only_prefill=streaming)
    if streaming:
        _stream(model, tokenizer, prompts[0], options)
    else:
        _print_complete(model, tokenizer, prompts, options, arguments)


def _check(folder: Path) -> None:
    """Raise ValueError for a model that cannot be generated from, by its config files."""
    check_config(folder)
    GenerationDefaults.read(folder)


def _load(
    folder: Path,
    defaults: GenerationDefaults,
    arguments: argparse.Namespace,
    options: dict[str, Any],
    *,
    only_prefill: bool,
) -> CausalLM:
    """The model; what generation will run is compiled while it is read."""
    begin = time.perf_counter()
    keep_programs()
    stored = StoredModel.open(folder, verify=arguments.verify)
    defaults.check_vocabulary(stored.config.vocab_size)
    kinds = {name: getattr(arguments, name) for name in ("dtype", "kv_format", "implementation")}
    abstract = CausalLM.abstract(stored, **kinds)
    cache, tokens = check_call(abstract, **options), options["max_new_tokens"]
    print(f"{arguments.model}: a cache of {cache / 1e6:.1f} MB for {tokens} new tokens a prompt", file=sys.stderr)
    with ThreadPoolExecutor() as pool:
        model = pool.submit(abstract.filled, stored)
        warmup(abstract, **options, only_prefill=only_prefill)
        loaded = model.result()
    part = " the prompt" if only_prefill else ""
    print(f"{arguments.model}: read, and compiled for{part}, in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return loaded


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, arguments: argparse.Namespace) -> list[int]:
    if arguments.chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {arguments.model} has no chat template; leave out --chat")
        messages = [{"role": "user", "content": text}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        text = chat.render(tokenizer, messages, arguments.model)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt {text!r} is no Unicode text: {error}") from error
    ids = tokenizer(text, add_special_tokens=not arguments.chat).input_ids
    if not ids:
        raise ValueError(f"prompt {text!r} has no tokens; expected at least one")
    return ids


def pieces(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text of each new token, and what is left when no more come."""
    text = TextStream(tokenizer, prompt)
    yield from map(text.push, tokens)
    yield text.finish()


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
    sequences, lengths, finished = map(np.asarray, generate(model, **options)[:3])
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


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
