"""Hub ids: what is asked of the hub, in which order, and what is refused before weights are fetched."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import pytest
from fake_hub import Hub

from fireq_jax import LlamaForCausalLM, ModelConfig
from fireq_jax.checkpoints.hub import resolve_model
from fireq_jax.evaluation.command import main as evaluate
from fireq_jax.generation.command import main as generate

TINY = Path(__file__).parents[2] / "examples" / "tiny_llama"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A converted model with the tiny one's tokenizer."""
    folder = tmp_path_factory.mktemp("converted")
    vocabulary = json.loads((TINY / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    LlamaForCausalLM(ModelConfig(vocab_size=vocabulary, head_dim=16, **sizes), dtype=jnp.float32).save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def test_configs_come_first_and_other_formats_stay(hub, tmp_path):
    repository = shutil.copytree(TINY, tmp_path / "repository")
    (repository / "original").mkdir()
    for name in ("original/model.safetensors", "consolidated.00.pth", "figure.png"):
        (repository / name).write_bytes(b"large")
    hub.repositories["owner/tiny"] = repository
    folder = resolve_model("owner/tiny", "v1")
    assert hub.calls[0] == ("owner/tiny", "v1", ["config.json"])
    assert hub.calls[1][1] == "v1"
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(hub.calls[1][2])
    assert not hub.fetched & {"original/model.safetensors", "consolidated.00.pth", "figure.png"}
    assert LlamaForCausalLM.from_pretrained(folder).config.num_layers > 0


def test_a_converted_model_is_fetched_whole(hub, converted, capsys):
    hub.repositories["owner/converted"] = converted
    arguments = ["--model", "owner/converted", "--dtype", "float32", "--prompt", "The", "--max-new-tokens", "2"]
    assert generate([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens"] <= 2
    assert hub.calls[0][2] == ["fireq.json"]
    assert any(file.startswith("params/layers.0/") for file in hub.fetched)


def test_evaluation_names_models_as_they_were_given(hub, converted, tmp_path):
    hub.repositories["owner/converted"] = converted
    (tmp_path / "text.txt").write_text("The scale of a group is rounded. " * 4)
    sizes = ["--window", "8", "--max-windows", "1", "--json", str(tmp_path / "result.json")]
    models = ["--model", "owner/converted", "--revision", "v2", "--model", str(converted)]
    assert evaluate([*models, "--text", str(tmp_path / "text.txt"), *sizes]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result) == ["owner/converted", str(converted)]
    assert {revision for _, revision, _ in hub.calls} == {"v2"}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ("generation_config.json", {"temperature": []}, "temperature is []; expected a number"),
        ("fireq.json", {"format_version": 99}, "has format 99"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_its_weights(hub, tmp_path, capsys, file, fields, message):
    hub.repositories["owner/tiny"] = repository = shutil.copytree(TINY, tmp_path / "repository")
    (repository / file).write_text(json.dumps(fields))
    assert generate(["--model", "owner/tiny", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireq-generate: owner/tiny: ")
    assert message in error
    assert "model.safetensors" not in hub.fetched


def test_names_that_are_neither_are_quoted(hub, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("", "absent", "/absent/model", "./absent/model", "a/b/c", "../model", "file", "owner/", "owner/a b"):
        with pytest.raises(ValueError, match=f"model is {name!r}; expected an existing folder or a hub id"):
            resolve_model(name)
    assert not hub.calls


def test_a_failed_download_is_one_line(hub):
    with pytest.raises(ValueError, match=r"^model 'owner/gone' at revision 'v1' is not .+ 404 Client Error\. Repos.+$"):
        resolve_model("owner/gone", "v1")


def test_a_folder_comes_before_a_hub_id_and_has_no_revision(hub, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "owner" / "converted")
    assert resolve_model("owner/converted") == Path("owner/converted")
    with pytest.raises(ValueError, match="revision is 'v1', and owner/converted is a folder"):
        resolve_model("owner/converted", "v1")
    assert not hub.calls
