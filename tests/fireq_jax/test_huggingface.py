"""Reading checkpoints: every form they come in, and every way they are broken, by the tensor's name."""

import json
import os
import pickle
import shutil
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file
from tiny_llama import config_of, weights_of, write_folder

from fireq_jax import LlamaForCausalLM
from fireq_jax.checkpoints import huggingface
from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from fireq_jax.models.architectures import checkpoint_shapes
from fireq_jax.models.parameters import parameters_of

FIELDS = config_of("gqa")
TENSORS = weights_of(FIELDS)
DOWN = "model.layers.1.mlp.down_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED_FIELDS = config_of("mha_tied")
TIED = weights_of(TIED_FIELDS)


def write_sharded(folder, tensors, save=save_file, stem="model", suffix=".safetensors"):
    """Two shards and an index."""
    write_folder(folder, FIELDS, tensors)
    (folder / "model.safetensors").unlink()
    files = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, index, weight_map


def save_torch(tensors, path):
    torch = pytest.importorskip("torch")

    def to_torch(array):
        if array.dtype == ml_dtypes.float8_e4m3fn:  # from_numpy does not know it
            return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(array)

    torch.save({name: to_torch(array) for name, array in tensors.items()}, path)


def assert_reads(folder, tensors=TENSORS):
    checkpoint = HuggingFaceCheckpoint(folder)
    checkpoint.check_finite(progress=False)
    for name in checkpoint_shapes(config_of("gqa")):
        read = checkpoint.tensor(name)
        assert read.dtype == tensors[name].dtype
        np.testing.assert_array_equal(read, tensors[name])
    return checkpoint


# --- every form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_single_safetensors_of_every_float_dtype(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in TENSORS.items()}
    checkpoint = assert_reads(write_folder(tmp_path, FIELDS, tensors), tensors)
    assert checkpoint.nbytes == (tmp_path / "model.safetensors").stat().st_size
    block = checkpoint.block(1)
    np.testing.assert_array_equal(block["mlp.down_proj.weight"], tensors[DOWN])
    assert {f"model.layers.1.{name}" for name in block} == {name for name in tensors if ".layers.1." in name}
    assert checkpoint.global_names() == ["embed_tokens", "norm.weight", "lm_head"]
    np.testing.assert_array_equal(checkpoint.global_tensor("lm_head"), tensors["lm_head.weight"])


def test_sharded_safetensors(tmp_path):
    assert_reads(write_sharded(tmp_path, TENSORS)[0])


def test_torch_files(tmp_path):
    """Single and sharded, in the zip and in the legacy form; nn.Parameters, views and bfloat16."""
    torch = pytest.importorskip("torch")
    single = write_folder(tmp_path / "single", FIELDS)
    (single / "model.safetensors").unlink()
    mixed = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    mixed[Q] = torch.nn.Parameter(mixed[Q])
    mixed[DOWN] = torch.from_numpy(np.ascontiguousarray(TENSORS[DOWN].T)).T
    mixed["lm_head.weight"] = mixed["lm_head.weight"].bfloat16()
    expected = TENSORS | {"lm_head.weight": TENSORS["lm_head.weight"].astype(ml_dtypes.bfloat16)}
    for zipped in (True, False):
        torch.save(mixed, single / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert_reads(single, expected)
    assert_reads(write_sharded(tmp_path / "sharded", TENSORS, save_torch, "pytorch_model", ".bin")[0])


def test_a_single_file_wins_over_an_index_that_was_left(tmp_path):
    folder, _, _ = write_sharded(tmp_path, {name: 2 * array for name, array in TENSORS.items()})
    save_file(TENSORS, folder / "model.safetensors")
    assert_reads(folder)


def test_safetensors_win_over_torch_files(tmp_path):
    folder = write_folder(tmp_path, FIELDS)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_reads(folder)


def headless(tensors):
    """As LlamaModel saves them."""
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def without(tensors, *names):
    return {name: array for name, array in tensors.items() if name not in names}


OTHER = TIED[EMBEDDING].copy()
OTHER[-1, -1] += 1
FORMS = {
    "embedding alone": (True, TIED),
    "head alone": (True, without(TIED, EMBEDDING) | {HEAD: TIED[EMBEDDING]}),
    "the same twice": (True, TIED | {HEAD: TIED[EMBEDDING]}),
    "another head": (True, TIED | {HEAD: OTHER}),
    "no prefix": (True, headless(TIED)),
    "no prefix, another head": (True, headless(TIED) | {HEAD: OTHER}),
    "no prefix, head alone": (True, headless(without(TIED, EMBEDDING)) | {HEAD: OTHER}),
    "no prefix, untied": (False, headless(TIED) | {HEAD: OTHER}),
    "untied, the same twice": (False, TIED | {HEAD: TIED[EMBEDDING]}),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("form", FORMS)
def test_embedding_and_head_are_transformers(tmp_path, monkeypatch, form, kind):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tied, tensors = FORMS[form]
    folder = write_folder(tmp_path, {**TIED_FIELDS, "tie_word_embeddings": tied}, tensors)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        save_torch(tensors, folder / "pytorch_model.bin")
    monkeypatch.setattr(huggingface, "_COMPARED_BYTES", 10 * 48 * 8)  # seven slices
    checkpoint = HuggingFaceCheckpoint(folder)
    checkpoint.check_finite(progress=False)
    names = checkpoint.global_names()
    assert checkpoint.config.tie_word_embeddings == ("lm_head" not in names)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert checkpoint.config.tie_word_embeddings == (weights[0].data_ptr() == weights[1].data_ptr())
    head = "embed_tokens" if checkpoint.config.tie_word_embeddings else "lm_head"
    np.testing.assert_array_equal(checkpoint.global_tensor("embed_tokens"), weights[0].detach().numpy())
    np.testing.assert_array_equal(checkpoint.global_tensor(head), weights[1].detach().numpy())
    np.testing.assert_array_equal(checkpoint.block(1)["mlp.down_proj.weight"], TIED[DOWN])


def test_a_head_that_is_not_tied_after_all_is_used_aloud(tmp_path, caplog):
    model = LlamaForCausalLM.from_pretrained(write_folder(tmp_path, TIED_FIELDS, TIED | {HEAD: OTHER}))
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.lm_head.get_value(), OTHER.astype(ml_dtypes.bfloat16))
    assert [record.getMessage() for record in caplog.records if "ties head" in record.getMessage()]
    caplog.clear()
    half = {HEAD: TIED[EMBEDDING].astype(np.float16)}
    assert not HuggingFaceCheckpoint(write_folder(tmp_path, TIED_FIELDS, TIED | half)).config.tie_word_embeddings
    assert len(caplog.records) == 1
    assert HuggingFaceCheckpoint(write_folder(tmp_path, TIED_FIELDS, TIED)).config.tie_word_embeddings
    assert len(caplog.records) == 1


def test_heads_that_cannot_be_used(tmp_path):
    for tied, tensors, quoted in [
        (False, headless(TIED), r"lacks tensor lm_head\.weight, .* \(tie_word_embeddings is false\)"),
        (True, without(TIED, EMBEDDING), f"lacks tensor {EMBEDDING}"),
        (True, TIED | {HEAD: OTHER[:-1]}, r"lm_head\.weight in .* has shape \(66, 48\); expected \(67, 48\)"),
        (True, TIED | {HEAD: OTHER.astype(np.int8)}, r"lm_head\.weight in .* has dtype I8"),
    ]:
        folder = write_folder(tmp_path, {**TIED_FIELDS, "tie_word_embeddings": tied}, tensors)
        with pytest.raises(ValueError, match=quoted):
            HuggingFaceCheckpoint(folder)


def test_buffers_of_old_exports_are_not_needed(tmp_path):
    buffers = ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.cos")
    assert_reads(write_folder(tmp_path, FIELDS, TENSORS | {f"model.{name}": np.ones(6) for name in buffers}))


def test_model_holds_the_files_numbers(tmp_path):
    """q, k, v stacked; gate and up interleaved by eights; norms float32 whatever the dtype asked for."""
    model = LlamaForCausalLM.from_pretrained(write_folder(tmp_path, FIELDS), dtype=jnp.bfloat16)
    found = parameters_of(model)
    prefix = "model.layers.0."
    qkv = np.concatenate([TENSORS[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"])
    np.testing.assert_array_equal(found["layers.0.self_attn.qkv_proj.weight"], qkv.astype(ml_dtypes.bfloat16))
    gate_up = np.asarray(found["layers.0.mlp.gate_up_proj.weight"])
    np.testing.assert_array_equal(
        gate_up[16:24], TENSORS[f"{prefix}mlp.gate_proj.weight"][8:16].astype(ml_dtypes.bfloat16)
    )
    np.testing.assert_array_equal(
        gate_up[24:32], TENSORS[f"{prefix}mlp.up_proj.weight"][8:16].astype(ml_dtypes.bfloat16)
    )
    np.testing.assert_array_equal(found["norm.weight"], TENSORS["model.norm.weight"])


# --- broken in every way -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({DOWN: None}, f"lacks tensor {DOWN},"),
        ({DOWN: None, Q: None}, rf"lacks tensor {Q} \(and 1 more\)"),
        ({"model.layers.2.mlp.up_proj.weight": TENSORS[DOWN]}, "unexpected tensor model.layers.2.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)}, "unexpected tensor .*q_proj.bias"),
        ({DOWN: np.ascontiguousarray(TENSORS[DOWN].T)}, rf"{DOWN} .*\(100, 48\); expected \(48, 100\)"),
        ({Q: TENSORS[Q].astype(np.int8)}, f"{Q} .*dtype I8"),
        ({Q: TENSORS[Q].astype(ml_dtypes.float8_e4m3fn)}, f"{Q} .*dtype F8_E4M3"),
    ],
    ids=["missing", "two missing", "extra layer", "extra bias", "transposed", "int8", "fp8"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_wrong_tensors_are_named_when_the_checkpoint_is_opened(tmp_path, kind, change, quoted):
    tensors = {name: array for name, array in (TENSORS | change).items() if array is not None}
    folder = write_folder(tmp_path, FIELDS, tensors)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        save_torch(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=quoted):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_non_finite_numbers_are_found_and_placed(tmp_path, dtype, value):
    tensors = {name: array.astype(dtype) for name, array in TENSORS.items()}
    tensors[DOWN][3, 41] = value
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, FIELDS, tensors))
    with pytest.raises(ValueError, match=rf"{DOWN} .* holds {value} at \(3, 41\)"):
        checkpoint.check_finite(progress=False)


@pytest.mark.parametrize(("dtype", "value"), [(np.float64, 1e300), (np.float32, 3.4e38)])
def test_numbers_that_would_become_infinite_are_found(tmp_path, dtype, value):
    tensors = {name: array.astype(dtype) for name, array in TENSORS.items()}
    tensors["model.norm.weight"][5] = value
    checkpoint = HuggingFaceCheckpoint(write_folder(tmp_path, FIELDS, tensors))
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* at \(5,\)"):
        checkpoint.check_finite(progress=False)


class Malicious:
    """Unpickling this creates the file."""

    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


def test_a_torch_file_never_runs_code(tmp_path):
    torch = pytest.importorskip("torch")
    folder = write_folder(tmp_path, FIELDS)
    (folder / "model.safetensors").unlink()
    path, victim = folder / "pytorch_model.bin", tmp_path / "victim"
    payload = {Q: Malicious(victim)}
    for write in (
        lambda: torch.save(payload, path),
        lambda: torch.save(payload, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(payload)),
    ):
        write()
        with pytest.raises(ValueError, match="cannot be read as plain PyTorch weights"):
            HuggingFaceCheckpoint(folder)
        assert not victim.exists()


def test_torch_files_without_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    folder = write_folder(tmp_path, FIELDS)
    (folder / "model.safetensors").unlink()
    for content, quoted in [
        ([1, 2], "pytorch_model.bin"),
        ({name: torch.from_numpy(x) for name, x in TENSORS.items()} | {Q: 3}, Q),
        (
            {"model": {name: torch.from_numpy(x) for name, x in TENSORS.items()}},
            "model in .* is a dict; expected a ten",
        ),
    ]:
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=quoted):
            HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*(TypedStorage is|are) deprecated:UserWarning")
def test_torch_tensors_without_plain_numbers(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    folder = write_folder(tmp_path, FIELDS)
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    for change, quoted in [
        ({7: tensors[Q]}, "holds something under the key 7; expected tensors by name"),
        ({None: 3}, "under the key None"),
        ({Q: tensors[Q].to_sparse()}, f"{Q} in .* is a sparse_coo tensor"),
        ({Q: tensors[Q].to("meta")}, f"{Q} in .* is a meta tensor"),
        ({Q: torch.quantize_per_tensor(tensors[Q], 0.1, 0, torch.qint8)}, f"{Q} in .* is a quantized tensor"),
    ]:
        path = folder / "pytorch_model.bin"
        torch.save(tensors | change, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=quoted) as refusal:
            HuggingFaceCheckpoint(folder)
        assert str(path) in str(refusal.value)


def test_names_in_an_index_that_nothing_needs(tmp_path, caplog):
    """Neither in the files nor in the model: as when buffers were dropped after the index was written."""
    folder, index, weight_map = write_sharded(tmp_path, TENSORS)
    first = min(weight_map.values())
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": first, "model.layers.9.q_norm.weight": "none.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map | more}))
    assert_reads(folder)
    assert "lists model.layers.0.self_attn.rotary_emb.inv_freq (and 1 more)" in caplog.text


def test_weights_that_no_layer_takes_are_refused(tmp_path):
    norm = "model.layers.0.self_attn.q_norm.weight"
    folder, _, _ = write_sharded(tmp_path, TENSORS | {norm: np.ones(12, np.float32)})
    with pytest.raises(ValueError, match=f"unexpected tensor {norm}"):
        HuggingFaceCheckpoint(folder)


def test_files_of_an_index_stay_in_the_folder(tmp_path):
    folder, index, weight_map = write_sharded(tmp_path / "model", TENSORS)
    shard = weight_map[Q]
    shutil.copy(folder / shard, tmp_path / "outside.safetensors")
    outside = [
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        f"a/../../{shard}",
        "..\\outside",
        "C:x",
    ]
    for entry in [*outside, "", ".", None, 3, [shard]]:
        index.write_text(
            json.dumps({"weight_map": {name: entry if name == Q else weight_map[name] for name in TENSORS}})
        )
        with pytest.raises(
            ValueError, match=r"index\.json maps .*q_proj\.weight to .*; expected the name of a file in"
        ):
            HuggingFaceCheckpoint(folder)


def test_links_to_blobs_as_in_the_hubs_cache(tmp_path):
    folder, _, weight_map = write_sharded(tmp_path / "snapshot", TENSORS)
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = path.rename(tmp_path / "blobs" / f"{path.name}.blob")
        path.symlink_to(os.path.relpath(blob, folder))
    assert_reads(folder)
    (tmp_path / "blobs" / f"{weight_map[Q]}.blob").unlink()
    with pytest.raises(ValueError, match=f"{weight_map[Q]} is no regular file, or a link to one that is missing"):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    folder = write_folder(tmp_path, FIELDS)
    path = folder / name
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        path.unlink(missing_ok=True)
        make()
        with pytest.raises(ValueError, match=f"{path} is no regular file"):
            HuggingFaceCheckpoint(folder)
        if path.is_dir():
            path.rmdir()


def test_damaged_safetensors_name_the_file(tmp_path):
    folder = write_folder(tmp_path, FIELDS)
    path, content = folder / "model.safetensors", save(TENSORS)
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])

    def encoded(**changes):
        text = json.dumps({**header, Q: {**header[Q], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    damaged = [content[:7], content[: size // 2], content + b"more"]
    damaged += [struct.pack("<Q", length) + content[8:] for length in (0, size - 1, 2**40, 2**63)]
    damaged += [encoded(data_offsets=[0, 4]), encoded(data_offsets=[-4, 0]), encoded(shape=[2**62, 4])]
    damaged += [encoded(data_offsets=header[DOWN]["data_offsets"]), encoded(dtype="F99"), b"PK" + content]
    for damage in damaged:
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path} is not a readable safetensors file"):
            HuggingFaceCheckpoint(folder)


def test_refusals_of_a_config_name_its_file(tmp_path):
    folder = write_folder(tmp_path, {**FIELDS, "eos_token_id": 99}, TENSORS)
    with pytest.raises(ValueError, match=f"{folder}/config.json: eos_token_ids is .99,.; expected 0 to 66"):
        HuggingFaceCheckpoint(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert HuggingFaceCheckpoint(folder).config.eos_token_ids == (3, 4)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 99]}')
    with pytest.raises(
        ValueError, match=f"{folder}/generation_config.json: eos_token_ids is .3, 99.; expected 0 to 66"
    ):
        HuggingFaceCheckpoint(folder)
    (folder / "generation_config.json").unlink()
    write_folder(tmp_path, {**FIELDS, "num_hidden_layers": 10**6}, TENSORS)
    with pytest.raises(ValueError, match=f"{folder}/config.json: num_hidden_layers is 1000000; expected 1 to 10000"):
        HuggingFaceCheckpoint(folder)
    write_folder(tmp_path, {**FIELDS, "num_hidden_layers": 10_000}, TENSORS)
    with pytest.raises(ValueError, match=r"lacks tensor model\.layers\.10\..* \(and 89981 more\)"):
        HuggingFaceCheckpoint(folder)


def test_broken_indices(tmp_path):
    folder, index, weight_map = write_sharded(tmp_path, TENSORS)
    first, second = sorted(set(weight_map.values()))

    def refuses(content, quoted):
        index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
        with pytest.raises(ValueError, match=quoted):
            HuggingFaceCheckpoint(folder)

    refuses("{", "index.json")
    refuses("{}", "index.json.*weight_map")
    refuses('{"weight_map": [1]}', "index.json.*weight_map")
    refuses({**weight_map, Q: "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors, which is not in")
    refuses({**weight_map, Q: "../elsewhere.safetensors"}, "elsewhere.safetensors")
    wrong = next(name for name in weight_map if weight_map[name] == first)
    refuses({**weight_map, wrong: second}, f"{wrong} is in {second}, but it is not")
    refuses({name: file for name, file in weight_map.items() if name != Q}, f"lacks tensor {Q}")


def test_truncated_and_absent_files(tmp_path):
    folder = write_folder(tmp_path, FIELDS)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        HuggingFaceCheckpoint(folder)
    path.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        HuggingFaceCheckpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        HuggingFaceCheckpoint(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json"):
        HuggingFaceCheckpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LlamaForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        LlamaForCausalLM.from_pretrained(folder)
