"""What the report says of held-out text is what the stored models say, whatever interrupts the conversion."""

import dataclasses
import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import parameter_bytes, write_checkpoint

from checkpoints_convert import conversion, held_out
from checkpoints_convert.conversion import ConversionOptions, convert
from fireq_jax import LlamaForCausalLM, QuantizationConfig, recipes
from fireq_jax.evaluation.perplexity import perplexity
from fireq_jax.models.architectures import config_from_huggingface

FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIG = dataclasses.replace(
    recipes.fireq(), keep_float=("layers.1.mlp.down_proj",), lm_head_format="fp8", kv_format="fp8"
)
TOKENS, HELD_OUT = (np.random.default_rng(seed).integers(0, 64, (4, 24), dtype=np.int32) for seed in (1, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", FIELDS, 0.3)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("converted") / "model"
    return convert(options(source, output), TOKENS, held_out=HELD_OUT, progress=False), output


def options(model: Path, output: Path, quantization: QuantizationConfig = CONFIG) -> ConversionOptions:
    return ConversionOptions(model, output, "fireq", quantization, batch_size=3)


def test_perplexities_are_those_of_the_stored_models(source: Path, converted: tuple[dict, Path], tmp_path: Path):
    report, output = converted
    convert(options(source, tmp_path / "nearest", CONFIG.round_to_nearest()), None, progress=False)
    assert report["held_out"]["tokens"] == 4 * 23
    for name, folder in (("float", source), ("quantized", output), ("round_to_nearest", tmp_path / "nearest")):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=jnp.float32)
        expected = perplexity(model, HELD_OUT.reshape(-1), window=24, progress=False).perplexity
        assert report["held_out"]["perplexity"][name] == pytest.approx(expected, rel=1e-3)
    # So far apart that none of them is another.
    assert np.ptp(list(report["held_out"]["perplexity"].values())) > 0.05


def test_measuring_changes_nothing(source: Path, converted: tuple[dict, Path], tmp_path: Path) -> None:
    report = convert(options(source, tmp_path / "model"), TOKENS, progress=False)
    assert report["held_out"] is None
    assert parameter_bytes(tmp_path / "model") == parameter_bytes(converted[1])


@pytest.mark.parametrize("fail_at", [2, 3])
def test_an_interrupted_conversion_resumes_to_the_same_perplexities(
    source: Path, converted: tuple[dict, Path], tmp_path: Path, fail_at: int
) -> None:
    original, calls = conversion.folder.save_part, 0

    def interrupt(*args: object) -> str:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise KeyboardInterrupt
        return original(*args)

    output = tmp_path / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion.folder, "save_part", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(options(source, output), TOKENS, held_out=HELD_OUT, progress=False)
    with pytest.raises(ValueError, match="the calibration text, the number"):
        convert(options(source, output), TOKENS, held_out=HELD_OUT[:2], resume=True, progress=False)
    report = convert(options(source, output), TOKENS, held_out=HELD_OUT, resume=True, progress=False)
    assert report["held_out"] == converted[0]["held_out"]


def test_no_window_left_to_hold_out_is_a_warning(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    report = convert(options(source, tmp_path / "model"), TOKENS, held_out=HELD_OUT[:0], progress=False)
    assert report["held_out"] is None
    assert any("no window left to hold out" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("recipe", "tokens", "warns"), [("fireq_plus", 191, True), ("fireq_plus", 192, False), ("fireq", 64, False)]
)
def test_fewer_tokens_than_second_moments_need_are_a_warning(caplog: pytest.LogCaptureFixture, recipe, tokens, warns):
    config = config_from_huggingface(FIELDS)
    held_out.check_amount(config, recipes.by_name(recipe), np.zeros((1, tokens), np.int32))
    assert (f"{tokens} tokens of calibration text are few for layers of 96 inputs" in caplog.text) == warns


@pytest.mark.parametrize("tokens", [HELD_OUT + 50, HELD_OUT.astype(np.float32), HELD_OUT[0], HELD_OUT.tolist()])
def test_bad_tokens_are_refused_before_anything_is_written(source: Path, tmp_path: Path, tokens) -> None:
    with pytest.raises(ValueError, match="held-out tokens"):
        convert(options(source, tmp_path / "model"), TOKENS, held_out=tokens, progress=False)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("quantized", "nearest", "warns"),
    [(43.7, 48.1, False), (48.11, 48.1, False), (134.0, 47.9, True), (None, None, True)],
)
def test_worse_than_rounding_to_nearest_is_a_warning(caplog: pytest.LogCaptureFixture, quantized, nearest, warns):
    report = {"tokens": 9, "perplexity": {"float": 43.0, "quantized": quantized, "round_to_nearest": nearest}}
    with caplog.at_level(logging.INFO):
        held_out.log_report(report, "fireq_plus")
    assert [record.levelname for record in caplog.records] == ["INFO", *(["WARNING"] if warns else [])]
    assert ("recipe 'fireq_plus' is worse than rounding to nearest" in caplog.text) == warns
