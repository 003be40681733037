"""The tokenizer that a GGUF file describes, as a fast one of transformers.

transformers can build it itself, with torch installed; but it leaves out the splitting of text into words for names
that it does not know (as "smollm", whose digits stand alone), and such a tokenizer gives other tokens without a word.
Here an unknown name is an error.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fireq_jax.checkpoints.gguf_file import GGUFFile
from fireq_jax.checkpoints.transformers_import import import_transformers
from fireq_jax.config_fields import is_a, quote
from fireq_jax.json_files import errors_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id"}  # fmt: skip
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece writes it

# How text is cut into words: contractions, letters after at most one other sign, up to so many digits, other signs.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """What ``tokenizer.ggml.pre`` stands for.

    Attributes:
        pattern: of the words; None for GPT-2's.
        digits_alone: whether each digit is a word.
        whole_words: whether a word that is a token is never merged from parts.
        adds_bos: whether text begins with BOS where the file does not say.
        composed: whether text is brought into Unicode's form NFC first.
    """

    pattern: str | None = None
    digits_alone: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    composed: bool = False


_LLAMA3 = _Splitting(_WORDS.format(digits="{1,3}"), whole_words=True, adds_bos=True)
_QWEN2 = _Splitting(_WORDS.format(digits=""), composed=True)
_STARCODER = _Splitting(digits_alone=True)
_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting(),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Splitting(_TEKKEN, whole_words=True, adds_bos=True),
}


def has_tokenizer(file: GGUFFile) -> bool:
    """Whether a file says anything of a tokenizer."""
    return file.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")


def gguf_tokenizer(file: GGUFFile) -> "PreTrainedTokenizerBase":
    """The tokenizer in a file's metadata, with its chat template.

    Raises:
        ValueError: naming the file and the key, if there is none, or one that cannot be built here.
    """
    from tokenizers import AddedToken

    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    with errors_name(file.path):
        _check(said)
        tokens, kinds = said["tokens"], said.get("token_type") or [_NORMAL] * len(said["tokens"])
        build = _byte_level if said["model"] == "gpt2" else _sentencepiece
        tokenizer, adds_bos = build(said, tokens, kinds)
        special = {name: _token(said, key) for name, key in _SPECIAL.items()}
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    begin = special["bos_token"] if said.get("add_bos_token", adds_bos) else None
    end = special["eos_token"] if said.get("add_eos_token", False) else None
    _add_ends(tokenizer, begin, end)
    template = said.get(_TEMPLATE)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
        **({} if template is None else {"chat_template": template}),
    )


def _check(said: Mapping[str, Any]) -> None:
    if said.get("model") not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {quote(said.get('model'))}; expected 'gpt2' or 'llama'")
    needed = {"tokens": str, **({"merges": str} if said["model"] == "gpt2" else {"scores": float})}
    for name, kind in needed.items():
        values = said.get(name)
        if not isinstance(values, list) or not values or not all(is_a(value, kind) for value in values):
            raise ValueError(f"tokenizer.ggml.{name} is missing, or no list of {kind.__name__}")
    for name in ("scores", "token_type"):
        values, count = said.get(name, said["tokens"]), len(said["tokens"])
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(
                f"tokenizer.ggml.{name} is {quote(values)}; expected a list of {count}, one for each token"
            )
    if not isinstance(template := said.get(_TEMPLATE, ""), str):
        raise ValueError(f"{_TEMPLATE} is {quote(template)}; expected text")


def _token(said: Mapping[str, Any], key: str) -> str | None:
    index, count = said.get(key), len(said["tokens"])
    if index is None:
        return None
    if not is_a(index, int) or not 0 <= index < count:
        raise ValueError(f"tokenizer.ggml.{key} is {quote(index)}; expected 0 to {count - 1}")
    return said["tokens"][index]


def _byte_level(said: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> "tuple[Tokenizer, bool]":
    """BPE of bytes, as GPT-2's; and whether text begins with BOS unless the file says otherwise."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    name = said.get("pre")
    if not isinstance(name, str) or name not in _SPLITTINGS:
        raise ValueError(f"tokenizer.ggml.pre is {quote(name)}; expected one of {', '.join(_SPLITTINGS)}")
    splitting = _SPLITTINGS[name]
    if odd := [merge for merge in said["merges"] if merge.count(" ") != 1]:
        raise ValueError(f"tokenizer.ggml.merges has {quote(odd[0])}; expected two parts")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in said["merges"])]
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    tokenizer = _bpe(vocabulary, merges, ignore_merges=splitting.whole_words)
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    first = [] if splitting.pattern is None else [pre_tokenizers.Split(Regex(splitting.pattern), "isolated")]
    first += [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits_alone else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.adds_bos


def _sentencepiece(said: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> "tuple[Tokenizer, bool]":
    """BPE of characters, and of bytes for those that are no tokens, merged by the tokens' scores."""
    from tokenizers import decoders, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    merged = [(index, token) for index, token in enumerate(tokens) if kinds[index] in (_NORMAL, _USER_DEFINED)]
    pairs = [
        (-said["scores"][index], vocabulary[token[:cut]], vocabulary[token[cut:]])
        for index, token in merged
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]
    unknown = _token(said, "unknown_token_id") or next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None
    )
    tokenizer = _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefixed = said.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return tokenizer, True


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> "Tokenizer":
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library has no other
        raise ValueError(f"tokenizer.ggml.tokens and merges make no tokenizer: {error}") from error


def _add_ends(tokenizer: "Tokenizer", begin: str | None, end: str | None) -> None:
    """Tokens that every text begins and ends with."""
    from tokenizers import processors

    ends = [token for token in (begin, end) if token is not None]
    if not ends:
        return

    def around(text: str) -> list[str]:
        return [*([] if begin is None else [begin]), text, *([] if end is None else [end])]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=[*around("$A"), *around("$B:1")],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends)],
    )
