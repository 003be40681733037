"""Where a quantized model loses: what each of its roundings costs alone, and what is left without it.

A recipe is taken apart after it was converted: a float model in the same basis (smoothed, rotated, but not rounded)
runs with the quantized model's weights in some of its layers, and with some of the other roundings. So nothing is
converted twice, and costs can be compared: all are divergences from one model on the same tokens.
"""

import dataclasses
import fnmatch
import functools
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from fireq_jax.evaluation.perplexity import TokenScores, compare
from fireq_jax.evaluation.simulated import Roundings, embed, run_layer
from fireq_jax.models import CausalLM
from fireq_jax.models.block import linear_names, linears_of
from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig

LAYER_PIECE = "weights: layer "  # what names of pieces of one layer begin with
Windows = Mapping[str, Int[np.ndarray, "windows T"]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One experiment.

    Attributes:
        name: what is rounded, or after "all but" what is not.
        weights: patterns (``fnmatch``) of linear layers that have the quantized model's weights, such as
            "layers.0.*".
        roundings: what else is rounded.
        head: whether the last norm and the head are the quantized model's.
    """

    name: str
    weights: tuple[str, ...] = ()
    roundings: Roundings = dataclasses.field(default_factory=Roundings)
    head: bool = False

    def quantizes(self, linear: str) -> bool:
        """Whether the linear layer of that name has quantized weights."""
        return any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.weights)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a piece costs on one text.

    Attributes:
        perplexity: of the text.
        loss: perplexity over the float model's, minus 1.
        divergence: mean Kullback-Leibler divergence of the next token's distribution from the float model's, in nats.
        agreement: share of tokens before which both have the same likeliest token.
    """

    perplexity: float
    loss: float
    divergence: float
    agreement: float


def pieces_of(config: ModelConfig, quantization: QuantizationConfig) -> list[Piece]:
    """The experiments that take a recipe apart: everything, each piece alone, all but each, and layer by layer.

    Keys and values are tried in both of the cache's formats, whichever the recipe has.
    """
    cached = {quantization.kv_format, *(chosen for _, chosen in quantization.layer_kv_formats)} - {"none"}
    has = {"activations": quantization.activation_format != "none"}
    has |= dict.fromkeys(("keys", "values"), bool(cached))
    has |= dict.fromkeys(("queries", "probabilities"), bool(cached) or quantization.query_format != "none")
    rounded = [field.name for field in dataclasses.fields(Roundings) if has[field.name]]
    everything = dataclasses.replace(Roundings(), **dict.fromkeys(rounded, "own"))
    weights = () if all(map(quantization.keeps_float, linear_names(config))) else ("*",)
    head = quantization.lm_head_format != "none"
    nothing, replace = Roundings(), dataclasses.replace
    whole = Piece("everything", weights, everything, head)
    pieces = [whole]
    if weights:
        pieces.append(Piece("weights", weights))
        kinds = [linear.name.rsplit(".", 1)[1] for linear in linears_of(config)]
        pieces += [Piece(f"weights: {kind}", (f"*.{kind}",)) for kind in kinds]
    if head:
        pieces.append(Piece("head", head=True))
    fp8 = [name for name in rounded if name not in ("keys", "values")]
    pieces += [Piece(f"{name} fp8", roundings=replace(nothing, **{name: "fp8"})) for name in fp8]
    for name in ("keys", "values"):
        pieces += [Piece(f"{name} {form}", roundings=replace(nothing, **{name: form})) for form in ("fp8", "int4")]
    if weights:
        pieces.append(replace(whole, name="all but weights", weights=(), head=False))
    pieces += [
        replace(whole, name=f"all but {name}", roundings=replace(everything, **{name: "none"})) for name in rounded
    ]
    if weights:
        pieces += [Piece(f"{LAYER_PIECE}{i}", (f"layers.{i}.*",)) for i in range(config.num_layers)]
    return pieces


class Sensitivity:
    """Runs :class:`Piece` by piece on some texts.

    The float model's hidden states before each layer are kept on the host (:func:`kept_nbytes`), so that a piece
    begins at the first layer that it changes.

    Args:
        exact: the float model, in the basis of the other.
        quantized: the quantized model.
        texts: name of each text -> its windows.

    Raises:
        ValueError: if the models' architectures or smoothing differ, the float model has quantized weights, or a
            text has no window of two tokens.
    """

    def __init__(self, exact: CausalLM, quantized: CausalLM, texts: Windows) -> None:
        _check(exact, quantized, texts)
        self.exact, self.quantized, self.texts = exact, quantized, dict(texts)
        self.config = exact.config
        self._names = linear_names(self.config)
        self._layers = [[nnx.split(layer) for layer in model.layers] for model in (exact, quantized)]
        self.seconds = np.inf  # for one layer and window
        self._entering: dict[str, list[np.ndarray]] = {}
        for text, windows in self.texts.items():
            hidden = np.stack([np.asarray(embed(exact, window[None])[0]) for window in windows])
            self._entering[text] = [hidden]
            for index in range(self.config.num_layers):
                self._entering[text].append(self._run(Piece(""), index, self._entering[text][-1]))
        self.perplexity: dict[str, float] = {}
        self.perplexity = {text: self._cost(Piece(""), text).perplexity for text in self.texts}

    def passes(self, piece: Piece) -> int:
        """Layers times windows that a piece takes."""
        layers = self.config.num_layers - self._first_layer(piece)
        return layers * sum(map(len, self.texts.values()))

    def estimate(self, pieces: Sequence[Piece]) -> float:
        """Seconds that pieces take, but for compiling them and for their heads."""
        return self.seconds * sum(map(self.passes, pieces))

    def measure(self, piece: Piece) -> dict[str, Cost]:
        """What a piece costs, by text.

        Raises:
            ValueError: for a pattern that matches no layer.
        """
        for pattern in piece.weights:
            if not fnmatch.filter(self._names, pattern):
                raise ValueError(f"{piece.name!r}: {pattern!r} matches no layer; layers are {self._names[:4]} ...")
        return {text: self._cost(piece, text) for text in self.texts}

    def _cost(self, piece: Piece, text: str) -> Cost:
        windows, first = self.texts[text], self._first_layer(piece)
        hidden = self._entering[text][first]
        for index in range(first, self.config.num_layers):
            hidden = self._run(piece, index, hidden)
        scores = [
            jax.device_get(_compare(*self._heads(piece), *map(jnp.asarray, each)))
            for each in zip(hidden, self._entering[text][-1], windows, strict=True)
        ]
        nll, divergence, agreement = (float(np.mean(x, dtype=np.float64)) for x in zip(*scores, strict=True))
        perplexity = float(np.exp(nll))
        exact = self.perplexity.get(text, perplexity)
        return Cost(perplexity, perplexity / exact - 1, divergence, agreement)

    def _heads(self, piece: Piece) -> tuple:
        models = self.quantized if piece.head else self.exact, self.exact
        (graph, own), (other_graph, other) = (nnx.split(model) for model in models)
        return graph, other_graph, own, other

    def _first_layer(self, piece: Piece) -> int:
        if piece.roundings != Roundings():
            return 0
        changed = [i for i, name in enumerate(self._names) if piece.quantizes(name)]
        return changed[0] // len(linears_of(self.config)) if changed else self.config.num_layers

    def _run(self, piece: Piece, index: int, hidden: Float32[np.ndarray, "W T D"]) -> Float32[np.ndarray, "W T D"]:
        graph, state = self._layer(piece, index)
        quantization, output = self.quantized.layers[index].self_attn.quantization, np.empty_like(hidden)
        for row, x in enumerate(hidden):
            started = time.perf_counter()
            result = run_layer(graph, self.config, quantization, piece.roundings, state, jnp.asarray(x[None]))
            output[row] = np.asarray(result[0])
            self.seconds = min(self.seconds, time.perf_counter() - started)
        return output

    def _layer(self, piece: Piece, index: int) -> tuple[nnx.GraphDef, nnx.State]:
        """Layer ``index`` with the piece's weights; wholly the quantized model's if all of them are."""
        (graph, exact), (_, quantized) = (layers[index] for layers in self._layers)
        coded = {linear.name: piece.quantizes(f"layers.{index}.{linear.name}") for linear in linears_of(self.config)}
        if not any(coded.values()):
            return graph, exact
        other = dict(nnx.to_flat_state(quantized))
        flat = [
            (path, other[path] if all(coded.values()) or coded.get(".".join(map(str, path[:-1]))) else leaf)
            for path, leaf in nnx.to_flat_state(exact)
        ]
        return graph, nnx.from_flat_state(flat)


def kept_nbytes(config: ModelConfig, texts: Windows) -> int:
    """Bytes of hidden states that :class:`Sensitivity` keeps on the host."""
    return sum(windows.size for windows in texts.values()) * config.hidden_size * 4 * (config.num_layers + 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
    graph: nnx.GraphDef[CausalLM],
    exact_graph: nnx.GraphDef[CausalLM],
    state: nnx.State,
    exact_state: nnx.State,
    hidden: Float32[Array, "T D"],
    exact: Float32[Array, "T D"],
    tokens: Int[Array, " T"],
) -> TokenScores:
    own, other = nnx.merge(graph, state), nnx.merge(exact_graph, exact_state)
    return compare(own.logits(hidden)[None], other.logits(exact)[None], tokens[None])


def _check(exact: CausalLM, quantized: CausalLM, texts: Windows) -> None:
    if exact.config != quantized.config:
        raise ValueError("the float and the quantized model have different architectures; expected one")
    coded = [name for name in linear_names(exact.config) if not exact.quantization.keeps_float(name)]
    if coded:
        raise ValueError(
            f"the float model has quantized weights in {coded[0]} (and {len(coded) - 1} more); expected none"
        )
    if exact.quantization.smoothing != quantized.quantization.smoothing:
        raise ValueError(
            f"the float model has smoothing {exact.quantization.smoothing}, and the quantized one "
            f"{quantized.quantization.smoothing}; expected the same: convert it with float weights"
        )
    if not texts:
        raise ValueError("there are no texts; expected one or more")
    for name, windows in texts.items():
        if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
            raise ValueError(
                f"{name} has windows of shape {windows.shape}; expected [windows, T] of two tokens or more"
            )
