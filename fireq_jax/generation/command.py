"""``fireq-generate``: continue prompts, or answer them, on the command line."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import jax
import numpy as np

from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.checkpoints.hub import check_config, resolve_model
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.command_line import add_common_options, exit_code, leave
from fireq_jax.compilation import keep_programs
from fireq_jax.generation.defaults import SAMPLING, GenerationDefaults
from fireq_jax.generation.generate import GenerationOutput, check_call, generate, warmup
from fireq_jax.generation.prompts import Prompt, read_prompts
from fireq_jax.generation.sampling import SamplingConfig
from fireq_jax.generation.terminal import CHAT_SLOTS, COMMANDS, Answer, Chat, print_stream, run_chat
from fireq_jax.generation.text import TextStream, split_stop_strings
from fireq_jax.models.llama import CausalLM
from pallas_kernels import formats
from pallas_kernels.dispatch import Implementation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 128
CHAT_NEW_TOKENS = 1024
_FILE_HELP = "a prompt a line: text, or in a .jsonl objects with prompt or messages; - is standard input"
_CHAT_HELP = "prompts are users' messages: apply the tokenizer's chat template; without any, chat in the terminal"
_JSON_HELP = "print prompt, text, tokens and finished as a JSON list; of --prompts, as a line of JSON each"
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (``command_line``)."""
    arguments = _parser().parse_args(argv)
    return exit_code("fireq-generate", lambda: _run(arguments), arguments.log_level, arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fireq-generate",
        description="Continue prompts with a Hugging Face, GGUF or converted model, or chat with it. New text goes to "
        "stdout, speed to stderr. What is not given comes from generation_config.json in the model's folder, if it is "
        "there.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a model's folder or GGUF file, or a hub id to download")
    add("--revision", help="branch, tag or commit of the hub id")
    asked = parser.add_argument_group("prompts").add_argument
    asked("--prompt", action="append", metavar="TEXT", help="repeat it for a batch, printed when complete")
    asked("--prompts", metavar="FILE", help=_FILE_HELP)
    asked("--batch-size", type=int, default=16, metavar="N", help="prompts of --prompts that run at once; default 16")
    asked("--chat", action="store_true", help=_CHAT_HELP)
    asked("--system", metavar="TEXT", help="system message; with --chat, or --prompts that are messages")
    _add_choices(parser.add_argument_group("new tokens"))
    add("--no-stream", action="store_true", help="print text when it is complete")
    add("--json", action="store_true", help=_JSON_HELP)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of what is not quantized")
    add("--kv-format", choices=get_args(formats.KVFormat), help="of the cache, in place of the model's own")
    add("--implementation", choices=get_args(Implementation), default="auto", help="of the ops; default auto")
    add("--no-verify", dest="verify", action="store_false", help="take a converted model's files as they are")
    add_common_options(parser)
    return parser


def _add_choices(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--max-new-tokens", type=int, metavar="N", help=f"default {DEFAULT_NEW_TOKENS}, in a chat {CHAT_NEW_TOKENS}")
    add("--min-new-tokens", type=int, metavar="N", help="none that ends a text before so many")
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the text before TEXT, which is not printed; may be repeated",
    )
    add("--eos-token-id", action="append", type=int, metavar="ID", help="end at this token, too; may be repeated")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token: the default without filters")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 turns it off")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens that hold probability P")
    add("--min-p", type=float, metavar="P", help="sample from tokens at least P times as likely as the best")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens that are there already less likely")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens twice in the same order")
    add("--seed", type=int, default=0, help="of the sampling, the same for every prompt; default 0")


def _run(arguments: argparse.Namespace) -> None:
    key = _checked(arguments)
    prompts = _prompts(arguments)
    folder = resolve_model(arguments.model, arguments.revision, check=_check)
    defaults = GenerationDefaults.read(folder)
    if defaults.ignored:
        logger.warning("%s: %s: without effect here", defaults.path, ", ".join(defaults.ignored))
    tokenizer = load_tokenizer(folder, verify=arguments.verify)
    ids = [
        prompt.encoded(tokenizer, arguments.model, chat=arguments.chat, system=arguments.system)
        for prompt in prompts or [Prompt("Hello")]  # the chat template is tried, and compiled for
    ]
    width, asked = max(map(len, ids)), arguments.max_new_tokens
    stored = StoredModel.open(folder, verify=arguments.verify)
    defaults.check_vocabulary(stored.config.vocab_size)
    options = {
        "key": key,
        "tokenizer": tokenizer,
        "eos_token_ids": defaults.eos_ids(stored.config.eos_token_ids, arguments.eos_token_id or ()),
        "max_new_tokens": asked or defaults.new_tokens(width) or DEFAULT_NEW_TOKENS,
        **defaults.options(_given(arguments)),
    }
    if not prompts:
        options |= {"max_new_tokens": asked or defaults.max_new_tokens or CHAT_NEW_TOKENS}
        _chat(stored, tokenizer, ids[0], options, arguments)
    elif len(prompts) == 1 and not (arguments.no_stream or arguments.json or arguments.prompts):
        model = _load(stored, arguments, _padded(ids, width) | options, only_prefill=True)
        answer = print_stream(model, tokenizer, ids[0], options)
        _report(arguments, width, len(answer.tokens), answer.times[-1] - answer.times[0], answer.speed)
    else:
        _print_complete(stored, tokenizer, list(zip(prompts, ids, strict=True)), options, arguments)


def _checked(arguments: argparse.Namespace) -> jax.Array:
    """The key; bad options raise ValueError here, before they cost the minutes of loading a model."""
    if not (arguments.prompt or arguments.prompts or arguments.chat):
        raise ValueError("nothing is asked: give --prompt, --prompts, or --chat for a chat in the terminal")
    if arguments.prompt and arguments.prompts:
        raise ValueError(f"--prompt and --prompts {arguments.prompts} are given; expected one of them")
    if (arguments.json or arguments.no_stream) and not (arguments.prompt or arguments.prompts):
        option = "--json" if arguments.json else "--no-stream"
        raise ValueError(f"{option} is given, and a chat in the terminal has none; give --prompt or --prompts")
    for name in ("max_new_tokens", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    SamplingConfig(**GenerationDefaults(Path()).sampling(_given(arguments)))
    try:
        return jax.random.key(arguments.seed)
    except OverflowError as error:
        raise ValueError(f"--seed is {arguments.seed}; expected a number of 64 bits") from error


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (*SAMPLING, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
    return {name: getattr(arguments, name) for name in names} | {"stop_strings": arguments.stop}


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts)
    else:
        prompts = [Prompt(text) for text in arguments.prompt or ()]
    if arguments.system is not None and not arguments.chat and all(isinstance(each.given, str) for each in prompts):
        raise ValueError("--system is given without --chat, and no prompt has messages")
    return prompts


def _check(folder: Path) -> None:
    """Raise ValueError for a model that cannot be generated from, by its config files."""
    check_config(folder)
    GenerationDefaults.read(folder)


def _load(
    stored: StoredModel, arguments: argparse.Namespace, options: dict[str, Any], *, only_prefill: bool
) -> CausalLM:
    """The model; what generation will run is compiled while it is read."""
    begin = time.perf_counter()
    keep_programs()
    kinds = {name: getattr(arguments, name) for name in ("dtype", "kv_format", "implementation")}
    abstract = CausalLM.abstract(stored, **kinds)
    cache, tokens = check_call(abstract, **options), options["max_new_tokens"]
    _say(arguments, f"{arguments.model}: a cache of {cache / 1e6:,.2f} MB for {tokens} new tokens a prompt")
    part = " for the prompt" if only_prefill else ""
    if sys.stderr.isatty() or arguments.log_level < logging.WARNING:
        size = f"{abstract.nbytes / 1e6:,.0f} MB"
        _say(arguments, f"{arguments.model}: reading {size} from {stored.folder}, and compiling{part} ...")
    with ThreadPoolExecutor() as pool:
        model = pool.submit(abstract.filled, stored)
        warmup(abstract, **options, only_prefill=only_prefill)
        loaded = model.result()
    _say(arguments, f"{arguments.model}: read, and compiled{part}, in {time.perf_counter() - begin:.1f} s")
    return loaded


def _padded(prompts: Sequence[list[int]], width: int) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` [B, width]."""
    return {
        "input_ids": [prompt + [0] * (width - len(prompt)) for prompt in prompts],
        "attention_mask": [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts],
    }


def _print_complete(
    stored: StoredModel,
    tokenizer: "PreTrainedTokenizerBase",
    asked: list[tuple[Prompt, list[int]]],
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """A batch after the other, all of one shape."""
    width, size = max(len(ids) for _, ids in asked), len(asked)
    if arguments.prompts:
        size = min(size, arguments.batch_size)
    shape = _padded([ids for _, ids in asked[:size]], width)
    model = _load(stored, arguments, shape | options, only_prefill=False)
    start, count, results = time.perf_counter(), 0, []
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        filled = [ids for _, ids in batch] + [batch[-1][1]] * (size - len(batch))
        output = generate(model, **_padded(filled, width), **options)
        for (prompt, _), result in zip(batch, _texts(output, filled, options), strict=False):
            count += result["tokens"]
            results.append(prompt.fields | result)
            if not arguments.json:
                print(f"=== {prompt.shown}\n{result['text']}" if len(asked) > 1 else result["text"], flush=True)
            elif arguments.prompts:
                print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    seconds = time.perf_counter() - start
    if arguments.json and not arguments.prompts:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    _report(arguments, sum(len(ids) for _, ids in asked), count, seconds, f"{count / seconds:.1f} tokens/s")


def _texts(output: GenerationOutput, prompts: Sequence[list[int]], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What became of each prompt."""
    tokenizer, new_tokens = options["tokenizer"], options["max_new_tokens"]
    stops, _ = split_stop_strings(options["stop_strings"], tokenizer)
    sequences, lengths, finished = map(np.asarray, output[:3])
    for prompt, tokens, length, end in zip(prompts, sequences[:, -new_tokens:], lengths, finished, strict=True):
        text = TextStream(tokenizer, prompt, stops)
        parts = [*map(text.push, tokens[:length].tolist()), text.finish()]
        yield {"text": "".join(parts), "tokens": int(length), "finished": bool(end)}


def _chat(
    stored: StoredModel,
    tokenizer: "PreTrainedTokenizerBase",
    first: list[int],
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """A chat in the terminal, whose programs are compiled for a prompt like ``first``."""
    new_tokens = min(options["max_new_tokens"], max(1, stored.config.max_position_embeddings - len(first)))
    options |= {"max_new_tokens": new_tokens, "cache_capacity": max(CHAT_SLOTS, len(first) + new_tokens)}
    model = _load(stored, arguments, _padded([first], len(first)) | options, only_prefill=False)

    def report(answer: Answer) -> None:
        logger.info("%d tokens (%s)", len(answer.tokens), answer.speed)

    _say(arguments, COMMANDS)
    run_chat(Chat(model, tokenizer, arguments.model, options, arguments.system), report)


def _say(arguments: argparse.Namespace, text: str) -> None:
    """On stderr, unless it is to be quiet."""
    if arguments.log_level <= logging.WARNING:
        print(text, file=sys.stderr)


def _report(arguments: argparse.Namespace, prompt_tokens: int, count: int, seconds: float, speed: str) -> None:
    _say(arguments, f"{prompt_tokens} prompt tokens, {count} new ones in {seconds:.2f} s ({speed})")


def command() -> NoReturn:
    """:func:`main` as a process."""
    leave(main())


if __name__ == "__main__":
    command()
