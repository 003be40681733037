"""The card of a converted folder: metadata that the hub understands, and what a user needs to make it again."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import Hub
from small_checkpoint import TINY_LLAMA, parameter_bytes, write_checkpoint

from checkpoints_convert.convert_and_quantize import main
from checkpoints_convert.export_command import main as export
from checkpoints_convert.model_card import license_of, write_card
from fireq_jax import LlamaForCausalLM, recipes
from fireq_jax.checkpoints.reader import checkpoint_config

THEIRS = "---\nlanguage: en\nlicense: other\nlicense_name: tiny\nextra: [1]\n---\n# Tiny\nlicense: mit\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model", TINY_LLAMA, 0.05)
    (folder / "README.md").write_text(THEIRS)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "tiny int4"
    hub = Hub(output.parent / "cache")
    hub.repositories["owner/tiny"] = source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", hub.download)
        patch.chdir(output.parent)
        options = ["--recipe", "rtn", "--layer-format", "layers.1.*=fp8", "--dtype", "float32"]
        assert main(["--model", "owner/tiny", "--output", str(output), *options]) == 0
    return output


def test_the_hub_reads_what_it_is_and_where_it_is_from(converted: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = (converted / "README.md").read_text()
    assert text.startswith("---\n")
    metadata: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    tags = metadata.pop("tags")
    assert {"fireq", "llama", "int4", "fp8"} <= set(tags)
    assert metadata == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "library_name": "fireq-jax",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny",
    }
    report = json.loads((converted / "report.json").read_text())
    assert f"{report['bytes_after'] / 1e6:,.1f} MB, from {report['bytes_before'] / 1e6:,.1f} MB" in text
    assert "| but | `layers.1.*` fp8 |" in text


def test_its_recipe_makes_the_same_model_again(source: Path, converted: Path, tmp_path: Path) -> None:
    text = (converted / "README.md").read_text()
    (tmp_path / "recipe.json").write_text(text.split("```json\n")[1].split("```")[0])
    assert recipes.from_file(tmp_path / "recipe.json").layer_formats == (("layers.1.*", "fp8"),)
    command = ["--model", str(source), "--output", str(tmp_path / "again"), "--recipe", str(tmp_path / "recipe.json")]
    assert main([*command, "--dtype", "float32"]) == 0
    assert parameter_bytes(tmp_path / "again") == parameter_bytes(converted)
    assert json.loads((tmp_path / "again/report.json").read_text())["recipe"] == str(tmp_path / "recipe.json")


def test_it_may_be_changed_and_is_never_written_over_another(source: Path, converted: Path, tmp_path: Path) -> None:
    model = shutil.copytree(converted, tmp_path / "model")
    report = json.loads((model / "report.json").read_text())
    arguments: tuple[Any, ...] = (None, source, checkpoint_config(source), report)
    write_card(model, *arguments)
    assert "base_model" not in (model / "README.md").read_text()  # ours, so that a resumed run writes it anew
    (model / "README.md").write_text("# Mine\n")
    write_card(model, *arguments)
    assert (model / "README.md").read_text() == "# Mine\n"
    assert LlamaForCausalLM.from_pretrained(model).config == checkpoint_config(source)
    assert export(["--model", str(model), "--output", str(tmp_path / "out"), "--format", "compressed-tensors"]) == 0
    assert not (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("card", ["", "license: mit\n", "---\nlicense: mit\n", "# a\n---\nlicense: mit\n---\n"])
def test_a_card_without_metadata_has_no_license(tmp_path: Path, card: str) -> None:
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == {}
