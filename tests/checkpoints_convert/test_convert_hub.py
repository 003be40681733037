"""fireq-convert with hub ids: what cannot be converted is refused before weights are fetched."""

from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import pytest
from fake_hub import Hub

from checkpoints_convert.convert_and_quantize import main as convert
from fireq_jax import LlamaForCausalLM, ModelConfig

TINY = Path(__file__).parents[2] / "examples" / "tiny_llama"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "absent"], "absent"),
        (["--calibration", "gone.txt"], "gone.txt: no such file"),
        ([], "needs --calibration"),
        (["--calibration", "text.txt", "--calibration-samples", "0"], "samples is 0"),
        (["--calibration", "text.txt", "--batch-size", "0"], "batch_size is 0"),
        (["--calibration", "text.txt", "--dtype", "int8"], "dtype is 'int8'"),
        (["--calibration", "text.txt", "--keep-float", "layers.99.*"], "layers.99.*"),
    ],
)
def test_conversions_that_cannot_be_fetch_no_weights(hub, tmp_path, capsys, options, message):
    hub.repositories["owner/tiny"] = TINY
    (tmp_path / "text.txt").write_text("Some text. " * 100)
    assert convert(["--model", "owner/tiny", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert hub.fetched <= {"config.json"}
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_not_converted_again(hub, tmp_path, capsys):
    converted = tmp_path / "converted"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    LlamaForCausalLM(ModelConfig(vocab_size=9, head_dim=16, **sizes), dtype=jnp.float32).save(converted)
    hub.repositories["owner/converted"] = converted
    for model in ("owner/converted", str(converted)):
        assert convert(["--model", model, "--output", str(tmp_path / "out"), "--recipe", "rtn"]) == 2
        assert "is a converted model already" in capsys.readouterr().err
    assert hub.fetched == {"fireq.json"}


@pytest.mark.parametrize(
    ("length", "code", "said"), [(1024, 0, "on 16384 tokens, 0 held out"), (1100, 2, "the text has 17103 tokens")]
)
def test_a_dry_run_counts_a_text(tmp_path, capsys, length, code, said):
    sizes = ["--calibration-samples", "16", "--sequence-length", str(length)]
    command = ["--model", str(TINY), "--output", str(tmp_path / "out"), "--calibration", str(TINY / "calibration.txt")]
    assert convert([*command, *sizes, "--dry-run"]) == code
    assert said in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_fetches_no_weights(hub, tmp_path, capsys):
    hub.repositories["owner/tiny"] = TINY
    command = ["--model", "owner/tiny", "--output", str(tmp_path / "out"), "--recipe", "rtn", "--dry-run"]
    assert convert(command) == 0
    assert "MB (as bfloat16) twice" in (said := capsys.readouterr().out)
    assert "16 in int4" in said
    assert hub.fetched <= {"config.json"}
    assert not (tmp_path / "out").exists()
