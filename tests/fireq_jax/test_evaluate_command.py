"""fireq-evaluate: table, JSON, and errors without a traceback."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from fireq_jax import LlamaForCausalLM
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.evaluation import Evaluation, evaluate, format_table, perplexity
from fireq_jax.evaluation.command import main
from fireq_jax.text_data import load_tokens

MODEL = Path(__file__).parents[2] / "examples" / "tiny_llama"
SHORT = ["--window", "16", "--max-windows", "2", "--batch-size", "2"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The scale of a group is rounded before the codes are computed. " * 8)
    return path


def copy_of_model(folder):
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.txt", "*.md"))
    return folder


def test_two_models_table_and_json(tmp_path, text, capsys):
    other = copy_of_model(tmp_path / "other")
    file = tmp_path / "result.json"
    assert main(["--model", str(MODEL), "--model", str(other), "--text", str(text), *SHORT, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result) == [str(MODEL), str(other)]
    first, second = result.values()

    model = LlamaForCausalLM.from_pretrained(MODEL)
    tokens = load_tokens(text, load_tokenizer(MODEL))
    expected = perplexity(model, tokens, window=16, max_windows=2, batch_size=2, progress=False)
    compared = {"loss": None, "divergence": None, "agreement": None}
    protocol = {
        "text": str(text), "joined": False, "text_tokens": len(tokens), "window": 16, "stride": 16, "windows": 2,
        "tokens": 30,
    }  # fmt: skip
    assert first == {
        "perplexity": expected.perplexity, "tokens": 30, "bytes": model.nbytes, **compared, "protocol": protocol
    }  # fmt: skip
    assert second.pop("protocol") == first.pop("protocol")
    assert second == pytest.approx({**first, "loss": 0, "divergence": 0, "agreement": 1}, rel=1e-5, abs=1e-5)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "perplexity", "loss", "KL", "top-1", "tokens", "size"]
    assert [line.split()[0] for line in lines[:2]] == [str(MODEL), str(other)]
    assert lines[0].split()[1:] == [f"{expected.perplexity:.4f}", "30", "8.4", "MB"]
    assert lines[1].split()[2:] == ["+0.00%", "0.0000", "100.00%", "30", "8.4", "MB"]
    assert "2 windows of 16 tokens, side by side" in lines[-1]
    assert "without empty ones): 30 tokens scored" in lines[-1]
    assert not list(tmp_path.glob("result.json?*"))


def test_models_that_do_not_fit_together_are_not_compared(tmp_path, text, monkeypatch, caplog):
    other = copy_of_model(tmp_path / "other")
    options = {"window": 16, "max_windows": 2, "progress": False}
    monkeypatch.setattr("fireq_jax.device_memory._room", lambda devices: 17_000_000)  # of 8.4 MB each, and logits
    results = evaluate([MODEL, other], text, **options)
    assert [result.divergence for result in results] == [None, None]
    assert results[1].loss == 0
    assert f"divergence is not measured: {other} beside {MODEL}: logits takes" in caplog.text
    caplog.clear()
    evaluate([MODEL, other], text, divergence=False, **options)
    assert not caplog.messages


def test_options_reach_the_model(tmp_path, text):
    def result(*options):
        file = tmp_path / "result.json"
        assert main(["--model", str(MODEL), "--text", str(text), *SHORT, "--json", str(file), *options]) == 0
        return json.loads(file.read_text())[str(MODEL)]

    plain, int4 = result(), result("--kv-format", "int4")
    assert plain["perplexity"] != int4["perplexity"]
    assert plain["bytes"] == int4["bytes"]
    assert result("--stride", "4")["tokens"] == 15 + 4
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=jnp.float32)
    assert result("--dtype", "float32")["bytes"] == model.nbytes > 1.9 * plain["bytes"]


def test_figures_and_report(tmp_path, text, capsys):
    options = ["--plots", str(tmp_path / "plots"), "--report", str(tmp_path / "a.html"), "--plot-layers", "1"]
    assert main(["--model", str(MODEL), "--text", str(text), *SHORT, *options]) == 0
    figures = tmp_path / "plots" / MODEL.name
    assert sorted(path.name for path in figures.iterdir()) == ["layer.01.png", "overview.png"]
    page = (tmp_path / "a.html").read_text()
    assert page.count("<details>") == 1
    assert f"--report {tmp_path / 'a.html'}" in page
    assert "2 windows of 16 tokens" in page
    assert "2 figures in" in capsys.readouterr().out


def test_models_may_be_paths(text):
    (result,) = evaluate([MODEL], text, window=16, max_windows=1, progress=False)
    assert format_table([result]).splitlines()[1].startswith(str(MODEL))


def test_table_is_aligned():
    results = [
        Evaluation("a", 20.0, 1023, 8_000_000),
        Evaluation("longer/name", 220.5, 1_234_567, 12_345_678_901, 10.025),
    ]
    assert format_table(results).splitlines() == [
        "model        perplexity       loss     tokens         size",
        "a               20.0000                 1,023       8.0 MB",
        "longer/name    220.5000  +1002.50%  1,234,567  12,345.7 MB",
    ]


def check_error(arguments, capsys, *parts):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fireq-evaluate: ")
    for part in parts:
        assert part in captured.err


def test_errors_before_anything_is_loaded(tmp_path, text, capsys):
    gone = tmp_path / "gone"
    check_error(
        ["--model", gone, "--text", text], capsys, f"model is '{gone}'; expected an existing folder or a hub id"
    )
    check_error(["--model", tmp_path, "--text", text], capsys, f"{tmp_path} has no config.json")
    check_error(["--model", MODEL, "--model", MODEL, "--text", text], capsys, "is named more than once")
    check_error(["--model", MODEL, "--text", tmp_path / "gone.txt"], capsys, "gone.txt: no such file")
    check_error(["--model", MODEL, "--text", text, "--json", gone / "a.json"], capsys, "a folder that exists")
    check_error(["--model", MODEL, "--text", text, "--json", tmp_path], capsys, "a folder; expected a file")
    check_error(["--model", MODEL, "--text", text, "--plots", text], capsys, "expected a folder")
    one = ["--json", tmp_path / "a", "--report", tmp_path / "a"]
    check_error(["--model", MODEL, "--text", text, *one], capsys, "--json and --report are both", "two files")
    check_error(["--model", MODEL, "--text", text, "--report", gone / "a.html"], capsys, "--report is", "that exists")
    check_error(["--model", MODEL, "--text", text, "--plot-layers", "1"], capsys, "nothing is drawn")
    pages = ["--model", MODEL, "--text", text, "--plots", gone, "--plot-layers"]
    check_error([*pages, "0", "4"], capsys, "--plot-layers is '4'; expected 'all' or numbers from 0 to 3")
    assert not gone.exists()
    same = ["--model", MODEL, "--model", tmp_path / MODEL.name, "--text", text, "--plots", tmp_path]
    check_error(same, capsys, "expected different ones")
    check_error(["--model", MODEL, "--text", text, "--window", "1"], capsys, "window is 1; expected at least 2")
    with pytest.raises(SystemExit) as error:
        main(["--model", str(MODEL)])
    assert error.value.code == 2


def test_different_tokenizers_cannot_be_compared(tmp_path, text, capsys):
    other = copy_of_model(tmp_path / "other")
    file = other / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["post_processor"] = None  # no BOS
    file.write_text(json.dumps(fields))
    check_error(
        ["--model", MODEL, "--model", other, "--text", text, "--json", tmp_path / "result.json"],
        capsys,
        f"{MODEL} and {other} have different tokenizers",
        "differ from token 0 on",
    )
    assert not (tmp_path / "result.json").exists()
