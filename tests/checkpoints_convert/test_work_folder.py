"""What an interrupted conversion goes on from, and what is made of an output folder that holds something else."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from small_checkpoint import parameter_bytes, write_checkpoint

from checkpoints_convert import conversion, conversion_options, work_folder
from checkpoints_convert.conversion import ConversionOptions, convert
from checkpoints_convert.work_folder import WorkFolder
from fireq_jax import recipes
from fireq_jax.checkpoints.folder import MANIFEST, WORK_FOLDER

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 8), dtype=np.int32)


def options(model: Path, output: Path) -> ConversionOptions:
    return ConversionOptions(model, output, "fireq", recipes.fireq(), dtype="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_checkpoint(tmp_path_factory.mktemp("source") / "model", CONFIG, 0.05)
    (model / "tokenizer.json").write_text("{}")
    return model


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "fireq"
    convert(options(source, output), TOKENS, progress=False)
    return output


@pytest.fixture(scope="module")
def after_two_blocks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that was interrupted in its third and last block."""
    output = tmp_path_factory.mktemp("interrupted") / "fireq"
    original = conversion._convert_block

    def interrupt(*args: object) -> None:
        if args[2] == 2:
            raise KeyboardInterrupt
        original(*args)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_convert_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(options(source, output), TOKENS, progress=False)
    return output


@pytest.fixture
def interrupted(after_two_blocks: Path, tmp_path: Path) -> Path:
    return shutil.copytree(after_two_blocks, tmp_path / "out")


@pytest.fixture
def complete(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "out")


def resume(source: Path, output: Path) -> dict:
    return convert(options(source, output), TOKENS, resume=True, progress=False)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_finished_blocks_are_not_done_again(source: Path, converted: Path, interrupted: Path, monkeypatch) -> None:
    blocks, original = [], conversion._convert_block
    monkeypatch.setattr(conversion, "_convert_block", lambda *args: (blocks.append(args[2]), original(*args)))
    (interrupted / "params" / "layers.2.orbax-checkpoint-tmp").mkdir()
    resume(source, interrupted)
    assert blocks == [2]
    assert parameter_bytes(interrupted) == parameter_bytes(converted)
    smoothing, expected = (dict(np.load(output / "smoothing.npz")) for output in (interrupted, converted))
    np.testing.assert_equal(smoothing, expected)
    for part in ("", "params"):
        assert {path.name for path in (interrupted / part).iterdir()} == {
            path.name for path in (converted / part).iterdir()
        }


@pytest.mark.parametrize(
    ("path", "damage"),
    [
        ("params/layers.1", lambda path: [file.unlink() for file in (path / "d").iterdir()]),
        ("params/layers.0", shutil.rmtree),
        ("params/lm_head", lambda path: flip_bit(next((path / "d").iterdir()))),
        ("params/layers.0", lambda path: shutil.copytree(path.with_name("layers.1"), path, dirs_exist_ok=True)),
        (".conversion/hidden.2.npy", flip_bit),
        (".conversion/hidden.2.npy", Path.unlink),
        (".conversion/smoothing.0.npz", lambda path: path.write_bytes(path.read_bytes()[:100])),
        (".conversion/smoothing.1.npz", Path.unlink),
        (".conversion/block.0.json", Path.unlink),
        (".conversion/globals.json", Path.unlink),
        (".conversion/block.1.json", lambda path: path.write_text(path.read_text().replace("0.1", "0.2", 1))),
        (".conversion/block.1.json", lambda path: path.write_text("{")),
    ],
)
def test_damage_to_what_is_resumed_from_is_found_and_left_alone(
    source: Path, interrupted: Path, path: str, damage: Callable[[Path], object]
) -> None:
    damage(interrupted / path)
    before = sorted(interrupted.rglob("*"))
    with pytest.raises(ValueError, match=r"remove .* and convert again") as error:
        resume(source, interrupted)
    assert str(interrupted / path) in str(error.value)
    assert sorted(interrupted.rglob("*")) == before


def test_a_block_whose_record_is_gone_needs_what_entered_it(source: Path, interrupted: Path) -> None:
    (interrupted / ".conversion/block.1.json").unlink()
    with pytest.raises(ValueError, match=r"hidden\.1\.npy is missing"):
        resume(source, interrupted)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_other_companion_files_are_other_options(
    source: Path, interrupted: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    (model / name).write_text(json.dumps(CONFIG | {"use_cache": True}))
    monkeypatch.setattr(Path, "resolve", lambda path: source.resolve() if path == model else path.absolute())
    with pytest.raises(ValueError, match=rf"cannot resume .*: {name}, SHA-256 was .* and is now"):
        resume(model, interrupted)


def test_files_of_one_name_in_two_folders_are_two(source: Path, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    for name in ("a", "b"):
        (model / name).mkdir()
    shutil.copy(model / "model.safetensors", model / "a")
    (model / "model.safetensors").rename(model / "b" / "model.safetensors")
    files = [model / "a/model.safetensors", model / "b/model.safetensors"]
    found: Any = SimpleNamespace(config=conversion_options.open_checkpoint(source).config, files=files, quantized=False)
    fingerprint = conversion_options.fingerprint_of(options(model, tmp_path), found, None, None)
    assert {"a/model.safetensors, size and time", "b/model.safetensors, size and time"} <= set(fingerprint)


def test_resuming_a_complete_model_says_so_and_clears_up(source: Path, complete: Path, caplog) -> None:
    """As after a kill while the work folder was being removed."""
    (complete / WORK_FOLDER).mkdir()
    (complete / WORK_FOLDER / "block.1.json").write_text("{")
    with caplog.at_level(logging.INFO):
        assert resume(source, complete) == json.loads((complete / "report.json").read_text())
    assert f"{complete} is complete" in caplog.text
    assert not (complete / WORK_FOLDER).exists()


def test_a_complete_model_of_other_options_is_none_of_these(source: Path, complete: Path) -> None:
    other = dataclasses.replace(options(source, complete), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"cannot resume .*: dtype was 'float32' and is now 'bfloat16'"):
        convert(other, TOKENS, resume=True, progress=False)
    (complete / "report.json").unlink()
    with pytest.raises(ValueError, match=r"report\.json does not say what .* was made of; remove"):
        resume(source, complete)


def test_a_damaged_model_is_not_called_complete(source: Path, complete: Path) -> None:
    flip_bit(next((complete / "params/layers.1/d").iterdir()))
    with pytest.raises(ValueError, match=r"params/layers\.1 has changed"):
        resume(source, complete)


def test_no_two_conversions_write_to_one_folder(source: Path, interrupted: Path, tmp_path: Path) -> None:
    for output in (interrupted, tmp_path / "new"):
        work = WorkFolder(output)
        work.path.mkdir(parents=True, exist_ok=True)
        before = sorted(output.rglob("*"))
        with work._lock(), pytest.raises(ValueError, match=f"another process is converting into {output}"):
            resume(source, output)
        assert {*output.rglob("*")} == {*before, work._lock_path}
        resume(source, output)
        assert (output / MANIFEST).is_file()


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path: Path, monkeypatch) -> None:
    """Opened before the holder removed it, locked after: another process could lock a new file."""
    work = WorkFolder(tmp_path)
    work.path.mkdir()
    original, calls = work_folder.os.path.samestat, []

    def samestat(*args: object) -> bool:
        if not calls:
            work._lock_path.unlink()
            work._lock_path.touch()
        calls.append(args)
        return original(args[0], work._lock_path.stat())  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("os.path.samestat", samestat)
    with work._lock(), pytest.raises(ValueError, match="another process"):
        work._lock()
    assert len(calls) == 2


def test_links_are_not_written_through(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(target)
    with pytest.raises(ValueError, match=rf"{dangling} is a link to {target}, which is not there"):
        resume(source, dangling)
    target.mkdir()
    for name in (WORK_FOLDER, "params"):
        output = tmp_path / f"with {name}"
        output.mkdir()
        (output / name).symlink_to(target)
        with pytest.raises(ValueError, match=rf"{output / name} is a link"):
            resume(source, output)
    assert not list(target.iterdir())
    resume(source, dangling)  # which is a link to a folder by now
    assert (target / MANIFEST).is_file()


@pytest.mark.parametrize("existing", [False, True])
def test_a_first_block_that_overflows_leaves_nothing_behind(tmp_path: Path, existing: bool) -> None:
    huge = np.full((24, 40), 1e38, np.float32)
    model = write_checkpoint(tmp_path / "model", CONFIG, 0.05, **{"model.layers.0.mlp.down_proj.weight": huge})
    if existing:
        (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="block 0"):
        convert(options(model, tmp_path / "out"), TOKENS, progress=False)
    assert {path.name for path in tmp_path.rglob("out*")} == ({"out"} if existing else set())


def test_a_mesh_that_is_set_changes_nothing(source: Path, converted: Path, tmp_path: Path) -> None:
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        convert(options(source, tmp_path / "out"), TOKENS, progress=False)
    assert parameter_bytes(tmp_path / "out") == parameter_bytes(converted)
