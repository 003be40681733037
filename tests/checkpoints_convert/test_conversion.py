"""The converter: what it writes, that it can be killed and resumed, and that it refuses bad input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoint import parameter_bytes, write_checkpoint

from checkpoints_convert import conversion, work_folder
from checkpoints_convert.conversion import ConversionOptions, convert, dry_run
from checkpoints_convert.convert_and_quantize import main
from fireq_jax import LlamaForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints.folder import WORK_FOLDER
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.evaluation.smoothing_effect import read_smoothing
from fireq_jax.models.parameters import parameters_of
from pallas_kernels.quantized_tensor import QuantizedTensor

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", CONFIG, 0.05)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (6, 24), dtype=np.int32)


@pytest.fixture(scope="module")
def converted(source: Path, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "fireq"
    convert(options(source, output), tokens, progress=False)
    return output


def options(model: Path, output: Path, quantization: QuantizationConfig | None = None) -> ConversionOptions:
    return ConversionOptions(model, output, "fireq", quantization or recipes.fireq(), dtype="float32", batch_size=4)


def test_converted_folder_is_enough_to_run_and_close_to_the_source(source: Path, converted: Path) -> None:
    ids = jnp.arange(20)[None] % 64
    exact = LlamaForCausalLM.from_pretrained(source, dtype=jnp.float32)(ids)
    quantized = LlamaForCausalLM.from_pretrained(converted, dtype=jnp.float32)(ids)
    # INT4 with 128-wide groups loses about 12% of a random weight; four such layers in a block.
    error = jnp.linalg.norm(quantized - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.4


def test_converted_weights_take_four_bits(converted: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(converted, dtype=jnp.float32)
    down = model.layers[0].mlp.down_proj.weight.get_value()
    assert isinstance(down, QuantizedTensor)
    assert down.values.nbytes == 128 * 128 // 2  # [72, 100], padded to whole tiles of 64 x 128


def test_report_describes_every_layer(converted: Path) -> None:
    report = json.loads((converted / "report.json").read_text())
    assert report["recipe"] == "fireq"
    assert report["calibration_tokens"] == 6 * 24
    assert list(report["layers"]) == ["layers.0", "layers.1", "layers.2"]
    for layer in report["layers"].values():
        assert len(layer["weight_error"]) == 4
        assert all(0.05 < error < 0.2 for error in layer["weight_error"].values())


def test_calibration_step_compiles_once_for_all_blocks(source: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    from checkpoints_convert.calibrate import block_step

    block_step.clear_cache()
    convert(options(source, tmp_path / "out"), tokens, progress=False)
    assert block_step._cache_size() == 1


def test_same_input_gives_the_same_bytes(source: Path, tokens: np.ndarray, converted: Path, tmp_path: Path) -> None:
    convert(options(source, tmp_path / "again"), tokens, progress=False)
    assert parameter_bytes(tmp_path / "again") == parameter_bytes(converted)


@pytest.mark.parametrize("fail_at", ["save_part:1", "save_part:4", "write_sealed:3", "write_manifest:1"])
def test_interrupted_conversion_is_visibly_incomplete_and_resumes_to_the_same_result(
    source: Path, tokens: np.ndarray, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: str
) -> None:
    name, _, count = fail_at.partition(":")
    owner = work_folder if name == "write_sealed" else conversion.folder
    original, calls = getattr(owner, name), 0

    def interrupt(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == int(count):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(options(source, output), tokens, progress=False)
    with pytest.raises(ValueError, match=r"unfinished conversion|no config"):
        LlamaForCausalLM.from_pretrained(output)
    with pytest.raises(ValueError, match="--resume"):
        convert(options(source, output), tokens, progress=False)
    report = convert(options(source, output), tokens, resume=True, progress=False)
    assert parameter_bytes(output) == parameter_bytes(converted)
    assert not (output / WORK_FOLDER).exists()
    # Blocks of the interrupted run are counted, to a rounding each.
    assert report["seconds"] >= sum(block["seconds"] - 1e-3 for block in report["layers"].values())


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_result(
    source: Path, tokens: np.ndarray, converted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    np.save(tmp_path / "tokens.npy", tokens)
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from checkpoints_convert.conversion import ConversionOptions, convert\n"
        "from fireq_jax import recipes\n"
        "model, output, tokens = sys.argv[1:]\n"
        "options = ConversionOptions(Path(model), Path(output), 'fireq', recipes.fireq(), 'float32', 4)\n"
        "convert(options, np.load(tokens), progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, source, output, tmp_path / "tokens.npy"])
    deadline = time.monotonic() + 120
    while not (output / "params" / "layers.0").is_dir() and process.poll() is None and time.monotonic() < deadline:
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (output / "fireq.json").exists():
        pytest.skip("the conversion finished before it could be killed")
    convert(options(source, output), tokens, resume=True, progress=False)
    assert parameter_bytes(output) == parameter_bytes(converted)


def test_resume_with_other_options_is_refused(
    source: Path, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(options(source, output), tokens, progress=False)
    with pytest.raises(ValueError, match="the calibration text, the number"):
        convert(options(source, output), tokens[:4], resume=True, progress=False)
    other = dataclasses.replace(recipes.fireq(), group_size=64)
    with pytest.raises(ValueError, match=r"quantization\.group_size was 128 and is now 64"):
        convert(options(source, output, other), tokens, resume=True, progress=False)


def test_resume_from_another_source_is_refused(tokens: np.ndarray, tmp_path: Path) -> None:
    model, output = write_checkpoint(tmp_path / "model", CONFIG, 0.05), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(options(model, output), tokens, progress=False)
    (model / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match="rms_norm_eps was 1e-05 and is now 1e-06"):
        convert(options(model, output), tokens, resume=True, progress=False)
    (model / "config.json").write_text(json.dumps(CONFIG))
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"model\.safetensors, size and time was"):
        convert(options(model, output), tokens, resume=True, progress=False)


def test_a_run_that_was_killed_before_it_began_leaves_no_trace(
    source: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    work = tmp_path / "out" / WORK_FOLDER
    work.mkdir(parents=True)
    (work / "options.json.tmp").write_text("{")
    convert(options(source, tmp_path / "out"), tokens, progress=False)
    assert (tmp_path / "out" / "fireq.json").is_file()


def test_dead_weights_have_no_error(tokens: np.ndarray, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model = write_checkpoint(tmp_path / "model", CONFIG, 0.05, **{name: np.zeros((72, 100), np.float32)})
    report = convert(options(model, tmp_path / "out", recipes.rtn()), tokens, progress=False)
    assert report["layers"]["layers.1"]["weight_error"]["mlp.down_proj"] == 0.0


def test_output_that_holds_something_else_is_never_touched(source: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        convert(options(source, tmp_path), tokens, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_complete_output_is_never_overwritten(source: Path, tokens: np.ndarray, converted: Path) -> None:
    with pytest.raises(ValueError, match="already holds a complete model"):
        convert(options(source, converted), tokens, progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_tensor_stops_it_before_anything_is_written(
    tmp_path: Path, tokens: np.ndarray, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = np.zeros((100, 72), np.float32)
    bad[3, 5] = value
    model = write_checkpoint(tmp_path / "model", CONFIG, 0.05, **{name: bad})
    with pytest.raises(ValueError, match=rf"{name}.*\(3, 5\)"):
        convert(options(model, tmp_path / "out"), tokens, progress=False)
    assert not (tmp_path / "out").exists()


def test_keep_float_layers_stay_float(source: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    kept = dataclasses.replace(recipes.fireq(), keep_float=("layers.0.*", "*.down_proj"))
    convert(options(source, tmp_path / "out", kept), tokens, progress=False)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=jnp.float32)
    quantized = [isinstance(layer.mlp.gate_up_proj.weight.get_value(), QuantizedTensor) for layer in model.layers]
    assert quantized == [False, True, True]
    assert not any(isinstance(layer.mlp.down_proj.weight.get_value(), QuantizedTensor) for layer in model.layers)


def test_an_fp8_head_is_stored_as_such(source: Path, tmp_path: Path) -> None:
    quantization = dataclasses.replace(recipes.rtn(), lm_head_format="fp8")
    convert(options(source, tmp_path / "out", quantization), None, progress=False)
    head = parameters_of(LlamaForCausalLM.from_pretrained(tmp_path / "out"))["lm_head"]
    assert isinstance(head, QuantizedTensor)
    assert head.nbytes == 64 * 72 + 4 * 64
    exact = load_file(source / "model.safetensors")["lm_head.weight"]
    # Half a step of E4M3's three mantissa bits, and the subnormals below 2^-6 of a row's largest / 448.
    np.testing.assert_allclose(head.dequantize(), exact, rtol=2**-4, atol=np.abs(exact).max() / 448 * 2**-10)


def test_other_magnitudes_are_stored_and_read_back(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["--model", str(source), "--output", str(output), "--recipe", "rtn", "--weight-format", "nf4"]) == 0
    down = parameters_of(LlamaForCausalLM.from_pretrained(output))["layers.1.mlp.down_proj.weight"]
    assert isinstance(down, QuantizedTensor)
    assert down.format == "nf4"
    exact = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    error = np.linalg.norm(np.asarray(down.dequantize()) - exact) / np.linalg.norm(exact)
    assert 0.05 < error < 0.12  # 15 levels of normal weights


def test_recipes_are_listed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--list-recipes", "--help"):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert recipes.described() in capsys.readouterr().out


def test_a_dry_run_says_what_a_run_logs_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    command = ["--model", str(source), "--output", str(output), "--recipe", "rtn", "--lm-head-format", "fp8"]
    command += ["--layer-format", "layers.1.*=fp8", "layers.2.mlp.*=none"]
    assert main([*command, "--dry-run"]) == 0
    assert not output.exists()
    said = capsys.readouterr().out.splitlines()
    assert main(command) == 0
    assert main([*command, "--dry-run"]) == 2
    assert "already holds a complete model" in capsys.readouterr().err
    assert "\n".join(said[:-1]) in caplog.text  # the last has how much of the disk is free
    report = json.loads((output / "report.json").read_text())
    assert f"from {report['bytes_before'] / 1e6:.2f} MB to {report['bytes_after'] / 1e6:.2f} MB" in said[2]
    assert "linear layers: 6 in int4, 4 in fp8" in said[3]
    assert "2 linear layers stay bfloat16" in said[4]
    assert "layers.2.mlp.gate_up_proj, layers.2.mlp.down_proj" in said[4]


def test_what_calibration_costs_is_said_in_time(source: Path, tmp_path: Path) -> None:
    planned = options(source, tmp_path / "out", dataclasses.replace(recipes.fireq_plus(), learned_steps=2))
    said = "\n".join(dry_run(planned, (6, 24), 2))
    assert re.search(r"on 144 tokens, 48 held out: \S+ TFLOP, at least \d+ s of matrix products at \S+ TFLOP/s", said)
    assert "cache: int4 in 3 layers" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["rtn", "w4a16", "w8a8_fp8", "none"])
def test_recipes_without_calibration_need_no_text(source: Path, tmp_path: Path, recipe: str) -> None:
    command = ["--model", str(source), "--output", str(tmp_path / "out"), "--recipe", recipe, "--dtype", "float32"]
    assert main(command) == 0
    logits = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=jnp.float32)(jnp.arange(8)[None])
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "firek"], "'firek'"),
        (["--recipe", "fireq"], "--calibration"),
        (["--recipe", "rtn", "--keep-float", "layers.9.*"], "layers.9"),
        (["--recipe", "rtn", "--keep-float", "layers.9.*", "--keep-float", "layers.0.*"], "layers.9"),
        (["--recipe", "rtn", "--dtype", "float8"], "'float8'"),
        (["--recipe", "w8a8_fp8", "--weight-format", "nf4"], "'w8a8_fp8' has no 4-bit weights"),
    ],
)
def test_command_line_errors_quote_the_value_and_write_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--model", str(source), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_bytes_are_those_of_the_parameters(source: Path, tmp_path: Path) -> None:
    """Nothing is smaller where nothing is quantized, however the files are packed."""
    report = convert(
        ConversionOptions(source, tmp_path / "out", "none", recipes.none(), "float32"), None, progress=False
    )
    assert report["bytes_after"] == LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").nbytes
    assert report["bytes_after"] == pytest.approx(report["bytes_before"], rel=0.01)  # norms are float32


def test_an_unfinished_conversion_is_no_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / WORK_FOLDER).mkdir()
    for read in (load_tokenizer, LlamaForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="unfinished conversion"):
            read(tmp_path)


def test_a_folder_that_orbax_cannot_write_to_is_refused(source: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out[4bit]"
    assert main(["--model", str(source), "--output", str(folder), "--recipe", "rtn"]) == 2
    assert "out[4bit] has a '[' in it" in capsys.readouterr().err
    assert not folder.exists()


def test_text_that_a_recipe_does_not_read_is_said(source: Path, tmp_path: Path, caplog) -> None:
    arguments = ["--model", str(source), "--output", str(tmp_path / "out"), "--recipe", "rtn"]
    assert main([*arguments, "--calibration", "gone.txt"]) == 0
    assert "'rtn' reads no text" in caplog.text


def test_unknown_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "./nowhere", "--output", str(tmp_path / "out"), "--recipe", "rtn"]) == 2
    assert "'./nowhere'" in capsys.readouterr().err


def test_smoothing_effect_is_recorded(converted: Path) -> None:
    effect = read_smoothing(converted)
    assert len(effect) == 3 * 5
    assert effect["layers.2.keys"]["before"].shape == (2, 16)
    # N and S bring every pair's largest key to at most alpha = beta, up to the rounding of a product.
    assert effect["layers.2.keys"]["post_rope"].max() <= recipes.fireq().smoothing.beta * 1.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "folder"}, "model is 'folder'; expected "),
        ({"quantization": "fireq"}, "quantization is 'fireq'; expected QuantizationConfig"),
        ({"dtype": None}, "dtype is None; expected str"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0; expected a whole number"),
    ],
)
def test_options_of_another_kind(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options(Path("model"), Path("output")), **changes)
