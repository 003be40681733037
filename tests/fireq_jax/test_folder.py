"""Saved models come back bit for bit, or not at all."""

import dataclasses
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import config_of

from fireq_jax import LlamaForCausalLM, QuantizationConfig, recipes
from fireq_jax.checkpoints import folder as checkpoint
from fireq_jax.json_files import read_sealed, write_json, write_sealed
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.parameters import parameters_of

CONFIG = config_from_huggingface(config_of("mha_tied", num_hidden_layers=2, attention_bias=True))
ON_CPU = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
CONFIGS = {name: recipe() for name, recipe in recipes.RECIPES.items()} | {
    "groups of 64, first layer float": QuantizationConfig(group_size=64, keep_float=("layers.0.*",)),
}


def save(folder, quantization, dtype=jnp.bfloat16):
    """A random model, with a post-RoPE scale that is not 1, in ``folder``."""
    model = LlamaForCausalLM(CONFIG, quantization, dtype=dtype)
    for layer in model.layers:
        if layer.self_attn.post_rope_scale is not None:
            layer.self_attn.post_rope_scale.set_value(jnp.linspace(0.5, 2, 48).reshape(4, 12))
    model.save(folder)
    return model


# When one read fails Orbax abandons the others, which complain when they are collected.
abandons_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def _collect_abandoned_reads():
    """In the test that caused them, not in a later one."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A ``fireq`` model; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(folder, recipes.fireq())
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert jax.tree.structure(found[name]) == jax.tree.structure(value), name
        for one, two in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            assert one.dtype == two.dtype, name
            np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(two).view(np.uint8), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_round_trips_bit_for_bit(name, tmp_path):
    model = save(tmp_path, CONFIGS[name])
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (again.config, again.quantization, again.dtype) == (model.config, model.quantization, model.dtype)
    assert_same(parameters_of(again), parameters_of(model))
    assert again.nbytes == model.nbytes
    weights = sum(path.stat().st_size for path in (tmp_path / "params").rglob("*") if path.is_file())
    assert weights < model.nbytes * 1.1 + 64 * 1024  # 4-bit weights take 4 bits on disk, too


def test_dtype_of_the_float_parameters_is_the_callers(saved):
    """bf16 on disk, float32 on request: the same numbers; quantized values and norms as stored."""
    wide, stored = (parameters_of(LlamaForCausalLM.from_pretrained(saved, dtype=d)) for d in ("float32", "bfloat16"))
    assert wide["embed_tokens"].dtype == jnp.float32
    for name, value in stored.items():
        if isinstance(value, jax.Array):
            np.testing.assert_array_equal(wide[name], value.astype(jnp.float32))
        else:
            assert_same({name: wide[name]}, {name: value})


@pytest.mark.parametrize("kv_format", ["none", "fp8", "int4"])
def test_kv_format_override(saved, kv_format):
    """The layers really use it, not only the model's record of it."""
    model = LlamaForCausalLM.from_pretrained(saved, kv_format=kv_format)
    assert model.quantization == recipes.fireq().with_kv_format(kv_format)
    tokens, lengths = jnp.asarray([[1, 2]]), jnp.asarray([2])
    _, cache = nnx.eval_shape(lambda m: m.prefill(tokens, lengths, 4), model)
    dtype = {"none": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8}[kv_format]
    assert all(layer.key.values.dtype == layer.value.values.dtype == dtype for layer in cache.layers)


def test_unfinished_folder_is_refused(copy):
    """The manifest is written last; without it nothing else counts."""
    (copy / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"unfinished conversion.*--resume"):
        LlamaForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("part", ["layers.1", "embed_tokens", "norm"])
def test_missing_part_is_named(copy, part):
    shutil.rmtree(checkpoint.part_path(copy, part))
    with pytest.raises(ValueError, match=rf"params/{part} is missing"):
        LlamaForCausalLM.from_pretrained(copy)


@abandons_reads
@pytest.mark.usefixtures("_collect_abandoned_reads")
@pytest.mark.parametrize("kept", [0, 0.5])
def test_truncated_data_is_refused(copy, kept):
    """Every data file that is needed, one at a time; the others (Orbax leaves some) change nothing."""
    model = nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, recipes.fireq()))
    expected = {name: x for name, x in parameters_of(model).items() if name.startswith("layers.1.")}
    exact = checkpoint.restore_part(copy, "layers.1", expected)
    refused = 0
    for path in sorted(checkpoint.part_path(copy, "layers.1").rglob("d/*")):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        try:
            found = checkpoint.restore_part(copy, "layers.1", expected)
        except ValueError as error:
            refused += "params/layers.1 does not hold the arrays" in str(error)
        else:
            assert_same(found, exact)
        path.write_bytes(content)
    assert refused >= 2


def edit(folder, change):
    """Another manifest, with the checksum that belongs to it."""
    path = folder / checkpoint.MANIFEST
    fields = read_sealed(path, "")
    change(fields)
    write_sealed(path, fields)


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        (lambda f: f.update(format_version=3), "has format 3; expected 2"),
        (lambda f: f.update(format_version=1), r"'sha256'\]; expected \['format_version', 'model', 'quantization'\]"),
        (lambda f: f.update(sha256=["params"]), r"sha256 is \['params'\]; expected an object"),
        (lambda f: f["sha256"].pop("params/norm"), "has no digest of params/norm"),
        (lambda f: f.update(comment="hello"), "'comment'"),
        (lambda f: f.pop("model"), "'format_version', 'quantization'.*; expected.*'model'"),
        (lambda f: f["model"].update(layers=1), "'layers'"),
        (lambda f: f["model"]["rope"].update(base=1), "'base'"),
        (lambda f: f["model"].pop("rope"), "lacks rope"),
        (lambda f: f["model"].pop("hidden_size"), "lacks hidden_size"),
        (lambda f: f.update(model=None), "is None; expected an object"),
        (lambda f: f["model"].update(hidden_size="64"), "hidden_size is '64'; expected a whole number"),
        (lambda f: f["model"].update(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; expected a number"),
        (lambda f: f["model"].update(tie_word_embeddings="false"), "'false'; expected true or false"),
        (lambda f: f["model"].update(eos_token_ids=["2"]), r"\('2',\); expected a whole number"),
        (lambda f: f["quantization"].update(bits=3), "'bits'"),
        (lambda f: f["quantization"]["smoothing"].update(gamma=3), "'gamma'"),
        (lambda f: f["quantization"].update(weight_format="int3"), "'int3'"),
    ],
)
def test_manifest_keys_are_all_known(copy, change, quoted):
    edit(copy, change)
    with pytest.raises(ValueError, match=quoted):
        LlamaForCausalLM.from_pretrained(copy)


def test_manifest_that_is_not_json(copy):
    (copy / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"fireq\.json is not valid JSON"):
        LlamaForCausalLM.from_pretrained(copy)


@abandons_reads
@pytest.mark.usefixtures("_collect_abandoned_reads")
@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model"].update(intermediate_size=300),
        lambda f: f["quantization"].update(group_size=64),
        lambda f: f["quantization"].update(weight_format="fp8"),
        lambda f: f["quantization"].update(smoothing=None),
        lambda f: f["quantization"].update(keep_float=["layers.0.*"]),
    ],
    ids=["sizes", "groups", "format", "smoothing", "keep_float"],
)
def test_arrays_that_the_manifest_does_not_describe_are_refused(copy, change):
    edit(copy, change)
    with pytest.raises(ValueError, match="does not hold the arrays"):
        LlamaForCausalLM.from_pretrained(copy)


def test_another_scale_type_than_the_stored_one_is_refused_not_cast(copy):
    edit(copy, lambda f: f["quantization"].update(scale_dtype="bf16"))
    with pytest.raises(ValueError, match=r"group_scale as float8_e4m3fn; fireq\.json says bfloat16"):
        LlamaForCausalLM.from_pretrained(copy)


def test_a_part_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """A crash while a part is written leaves no folder of its name; saving again replaces a part."""
    values = {"norm.weight": jnp.arange(4.0)}
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(Exception, match="killed"):
            checkpoint.save_part(tmp_path, "norm", values)
    assert not checkpoint.part_path(tmp_path, "norm").exists()
    for factor in (1, 2):
        written = {name: factor * x for name, x in values.items()}
        checkpoint.save_part(tmp_path, "norm", written)
        found = checkpoint.restore_part(tmp_path, "norm", jax.eval_shape(lambda: values))
        np.testing.assert_array_equal(found["norm.weight"], written["norm.weight"])


@pytest.mark.parametrize("name", ["v[1]", "v\\1", "gs:", "gs:/v", "logs:", "v\udce9"])
def test_a_folder_that_orbax_cannot_write_to_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"(has a '.*' in it|is not UTF-8), which Orbax"):
        checkpoint.save_model(tmp_path / name, CONFIG, recipes.fireq(), {"norm.weight": jnp.ones(4)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["v]1", "*", "?", "{}", "%20", "#1", "a|b", "tail ", "a\nb", "gs", "gs:1", "file:", "~"]
)
def test_other_names_are_written_to_as_they_are(name, tmp_path):
    parameters = {"norm.weight": jnp.arange(4.0)}
    checkpoint.save_model(tmp_path / name, CONFIG, recipes.fireq(), parameters)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = checkpoint.restore_part(tmp_path / name, "norm", jax.eval_shape(lambda: parameters))
    assert_same(found, parameters)


def test_arrays_that_orbax_wrote_elsewhere_are_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MISTAKEN", re.compile("$^"))
    for name in ("v[1]", "v\\1"):
        with pytest.raises(OSError, match="does not hold what Orbax wrote"):
            checkpoint.save_model(tmp_path / name, CONFIG, recipes.fireq(), {"norm.weight": jnp.ones(4)})


def flip_bit(path, at=0.5, bit=0):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1 << bit
    path.write_bytes(content)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_loads(saved, copy, data):
    """Of any file that belongs to the model."""
    path = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    content = path.read_bytes()
    flip_bit(path, data.draw(st.floats(0, 1, exclude_max=True)), data.draw(st.integers(0, 7)))
    try:
        stored = checkpoint.StoredModel.open(copy)
        stored.read(expected_parameters(), jnp.bfloat16)
    except ValueError as error:
        assert str(copy) in str(error)  # noqa: PT017
    else:  # another way to write the same JSON
        assert path.name == checkpoint.MANIFEST
        assert checkpoint.read_manifest(copy) == checkpoint.read_manifest(saved)
    path.write_bytes(content)


@functools.cache
def expected_parameters():
    return parameters_of(nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, recipes.fireq())))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda params: shutil.copytree(params / "layers.0", params / "layers.1", dirs_exist_ok=True), r"layers\.1"),
        (lambda params: next((params / "norm/d").iterdir()).unlink(), "params/norm"),
        (lambda params: (params / "norm/d/more").write_text(""), "params/norm"),
        (lambda params: next((params / "norm/d").iterdir()).rename(params / "norm/d/other"), "params/norm"),
    ],
    ids=["replaced", "file missing", "file more", "file renamed"],
)
def test_a_part_that_is_another_than_was_written_is_refused(copy, damage, message):
    damage(copy / "params")
    with pytest.raises(ValueError, match=rf"{message} has changed: its SHA-256 is .*, expected .*--no-verify"):
        LlamaForCausalLM.from_pretrained(copy)


def test_a_part_of_a_model_of_the_same_shapes_is_refused_unless_nothing_is_verified(copy, tmp_path):
    model = LlamaForCausalLM(CONFIG, recipes.fireq(), rngs=nnx.Rngs(1))
    model.save(tmp_path / "other")
    part = checkpoint.part_path(copy, "layers.1")
    shutil.rmtree(part)
    shutil.copytree(checkpoint.part_path(tmp_path / "other", "layers.1"), part)
    with pytest.raises(ValueError, match=r"layers\.1 has changed"):
        LlamaForCausalLM.from_pretrained(copy)
    mixed = parameters_of(LlamaForCausalLM.from_pretrained(copy, verify=False))
    name = "layers.1.mlp.down_proj.weight"
    assert_same({name: mixed[name]}, {name: parameters_of(model)[name]})


@pytest.mark.parametrize("name", ["layers.2", "lm_head", "layers.1.old", "embed_tokens.orbax-checkpoint-tmp"])
def test_a_part_that_the_manifest_does_not_describe_is_refused(copy, name):
    checkpoint.part_path(copy, name).mkdir()
    with pytest.raises(ValueError, match=rf"params/{name} is no part of the model that .*fireq\.json describes"):
        LlamaForCausalLM.from_pretrained(copy, verify=False)


def test_fewer_layers_than_there_are_parts_are_refused(copy):
    edit(copy, lambda f: f["model"].update(num_layers=1))
    with pytest.raises(ValueError, match=r"params/layers\.1 is no part"):
        LlamaForCausalLM.from_pretrained(copy, verify=False)


def test_a_model_of_fewer_layers_replaces_one_of_more(copy):
    """What was half written there goes too; what is none of ours stays."""
    (copy / "params" / "norm.orbax-checkpoint-tmp").mkdir()
    (copy / "params" / "notes.txt").write_text("mine")
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, num_layers=1), recipes.fireq())
    model.save(copy)
    assert {path.name for path in (copy / "params").iterdir()} == {"embed_tokens", "layers.0", "norm", "notes.txt"}
    assert_same(parameters_of(LlamaForCausalLM.from_pretrained(copy)), parameters_of(model))


def test_a_changed_manifest_is_refused_unless_nothing_is_verified(copy):
    path = copy / checkpoint.MANIFEST
    path.write_text(path.read_text().replace('"theta": 500.0', '"theta": 501.0'))
    with pytest.raises(ValueError, match=r"fireq\.json has changed: .*, expected .*--no-verify"):
        LlamaForCausalLM.from_pretrained(copy)
    assert LlamaForCausalLM.from_pretrained(copy, verify=False).config.rope.theta == 501


def test_folders_without_digests_load_and_say_so(copy, caplog):
    path = copy / checkpoint.MANIFEST
    fields = {name: value for name, value in read_sealed(path, "").items() if name != "sha256"}
    write_json(path, fields | {"format_version": 1})
    LlamaForCausalLM.from_pretrained(copy)
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy}: format 1 has no digests; nothing is verified"
    ]


def test_a_part_that_does_not_fit_on_the_disk_is_one_error_that_names_it(tmp_path):
    """In another process: a limit cannot be raised again. Orbax's log of each thread's traceback is left out."""
    program = """
import resource, signal, sys, jax.numpy as jnp, numpy as np
from pathlib import Path
from fireq_jax.checkpoints import folder
from fireq_jax.json_files import write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
for write in (
    lambda to: folder.save_part(to, "norm", {f"norm.{i}": jnp.asarray(noise) for i in range(8)}),
    lambda to: write_json(to / "report.json", {"text": "x" * 40000}),
):
    try:
        write(Path(sys.argv[1]))
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, env=os.environ | ON_CPU, check=True
    )
    part, text = done.stdout.splitlines()
    assert part.startswith(f"{tmp_path}/params/norm cannot be written: ")
    assert text.startswith(f"{tmp_path}/report.json.tmp cannot be written: [Errno 27]")
    # asyncio logs one itself, of a task whose error nobody asked for, when that is collected.
    assert done.stderr.count("Traceback") <= 1
    assert not (tmp_path / "report.json.tmp").exists()
    assert not checkpoint.part_path(tmp_path, "norm").exists()


def test_a_model_goes_where_jax_is_told_to_put_arrays(saved):
    """The default device, or all of the mesh that is set, whatever the types of its axes."""
    program = """
import sys, jax, jax.numpy as jnp
from fireq_jax import LlamaForCausalLM

def place():
    model = LlamaForCausalLM.from_pretrained(sys.argv[1])
    jax.jit(lambda embeddings: embeddings + jnp.ones(48))(model.embed_tokens.get_value())
    places = {tuple(sorted(d.id for d in array.devices())) for array in jax.tree.leaves(model)}
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(model))
    print(*places)

place()
with jax.default_device(jax.devices()[2]):
    place()
for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(kind,))):
        place()
jax.config.update("jax_default_device", jax.devices()[1])
place()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, saved], capture_output=True, text=True, env=os.environ | ON_CPU, check=False
    )
    assert done.stdout.splitlines() == ["(0,)", "(2,)", "(0, 1, 2, 3)", "(0, 1, 2, 3)", "(1,)"], done.stderr


def test_json_is_written_as_a_whole(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "report.json", {"error": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_half_replaced_does_not_look_complete(copy, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(copy)
    save, calls = checkpoint.save_part, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(copy)
    with pytest.raises(ValueError, match=r"unfinished conversion|no config"):
        LlamaForCausalLM.from_pretrained(copy)


def test_float16_is_a_dtype_of_float_parameters(tmp_path):
    model = LlamaForCausalLM(CONFIG, recipes.fireq(), dtype=jnp.float16)
    model.save(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).embed_tokens.get_value().dtype == jnp.bfloat16
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=jnp.float16)
    assert_same(parameters_of(again), parameters_of(model))


def test_manifest_round_trip(tmp_path):
    quantization = dataclasses.replace(recipes.fireq(), keep_float=("*.o_proj",))
    digests = {"params/norm": "0" * 64}
    checkpoint.write_manifest(tmp_path, CONFIG, quantization, digests)
    assert checkpoint.read_manifest(tmp_path) == (CONFIG, quantization, digests)
