"""GGUF files are the checkpoints that they were made of, as far as their types of tensors go."""

import contextlib
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import TINY, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import weights_of, write_folder

from fireq_jax import AutoModelForCausalLM
from fireq_jax.checkpoints.gguf import GGUFCheckpoint
from fireq_jax.checkpoints.gguf_file import GGUFFile, find_gguf
from fireq_jax.checkpoints.hub import resolve_model
from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from fireq_jax.checkpoints.reader import checkpoint_config, open_checkpoint
from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.rope import rope_tables

GRANITE = {
    "embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **TINY, **changes}


def assert_same(path: Path, folder: Path) -> None:
    """The two hold one model, bit for bit."""
    one, two = GGUFCheckpoint(path), HuggingFaceCheckpoint(folder)
    assert one.config == two.config
    assert sorted(one.global_names()) == sorted(two.global_names())
    for name in one.global_names():
        np.testing.assert_array_equal(one.global_tensor(name), two.global_tensor(name))
    for index in range(one.config.num_layers):
        ours, theirs = one.block(index), two.block(index)
        assert sorted(ours) == sorted(theirs)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (config(), "F32"),
        (config(head_dim=24, num_attention_heads=3, num_key_value_heads=1), "F16"),
        (config(attention_bias=True, mlp_bias=True), "F32"),
        (config(tie_word_embeddings=True), "BF16"),
        (config("qwen2"), "Q8_0"),
        (config("qwen3", head_dim=32), "Q4_0"),
        (config("granite", **GRANITE), "Q4_1"),
        (config("smollm3", num_hidden_layers=4), "Q5_0"),
        (config(**WIDE), "Q4_K"),
        (config("qwen3", **WIDE), "Q6_K"),
    ],
)
def test_a_file_is_the_checkpoint_of_its_floats(tmp_path: Path, fields: dict[str, Any], kind: str) -> None:
    path = tmp_path / "model.gguf"
    floats = write_gguf(path, fields, weights_of(fields), kind)
    assert_same(path, write_folder(tmp_path / "folder", fields, floats))
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantized == (kind not in ("F32", "F16", "BF16"))
    assert not checkpoint.coded
    assert checkpoint.nbytes == path.stat().st_size
    checkpoint.check_finite(progress=False)
    kept = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    if fields["model_type"] != "granite":  # whose tensors are multiplied
        assert checkpoint.block(0)["mlp.down_proj.weight"].dtype.name == kept


def test_blocks_of_four_bits_are_what_the_format_says(tmp_path: Path) -> None:
    """Q4_0, decoded here: a factor in float16, then sixteen bytes whose low halves are the first sixteen numbers."""
    fields, path = config(), tmp_path / "model.gguf"
    write_gguf(path, fields, weights_of(fields), "Q4_0")
    tensor = GGUFFile.open(path).tensors["blk.1.ffn_up.weight"]
    octets = np.frombuffer(path.read_bytes()[tensor.start :][: tensor.nbytes], np.uint8).reshape(-1, 18)
    factor = np.ascontiguousarray(octets[:, :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([octets[:, 2:] & 15, octets[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    np.testing.assert_array_equal(
        GGUFCheckpoint(path).block(1)["mlp.up_proj.weight"], (factor * codes).reshape(tensor.shape)
    )


@pytest.mark.parametrize(
    ("said", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
             "rope.scaling.finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)  # fmt: skip
def test_context_extensions_are_those_of_the_config(
    tmp_path: Path, said: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    fields, path = config("qwen2"), tmp_path / "model.gguf"
    floats = write_gguf(path, fields, weights_of(fields), said={f"qwen2.{key}": value for key, value in said.items()})
    assert_same(path, write_folder(tmp_path / "folder", {**fields, "rope_scaling": scaling}, floats))


def test_factors_of_rotary_frequencies_are_llama_3s(tmp_path: Path) -> None:
    """llama.cpp's converter writes what Llama 3.1 divides each frequency by, in place of its band."""
    fields, path = config(rope_scaling=LLAMA3), tmp_path / "model.gguf"
    plain = 500.0 ** -(np.arange(8) / 8)
    smooth = np.clip((32 * plain / (2 * np.pi) - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    assert len({*factors.tolist(), 1.0, 8.0}) > 2
    floats = write_gguf(path, fields, weights_of(fields), more={"rope_freqs.weight": factors})
    checkpoints = GGUFCheckpoint(path), HuggingFaceCheckpoint(write_folder(tmp_path / "folder", fields, floats))
    positions, lengths = jnp.arange(64)[None], jnp.array([64])
    one, two = (rope_tables(each.config, each.config.rope, positions, lengths) for each in checkpoints)
    np.testing.assert_allclose(one, two, atol=2e-6)
    unscaled = config_from_huggingface(config()).rope
    assert not np.allclose(one, rope_tables(checkpoints[0].config, unscaled, positions, lengths), atol=0.1)


def test_logits_are_the_checkpoint_s(tmp_path: Path) -> None:
    fields, path = config(num_hidden_layers=1), tmp_path / "model.gguf"
    floats = write_gguf(path, fields, weights_of(fields), "Q8_0")
    folder = write_folder(tmp_path / "folder", fields, floats)
    ids = np.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(model, dtype=jnp.float32)(ids) for model in (path, folder))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_split_model_is_one(tmp_path: Path) -> None:
    fields, folder = config(), tmp_path / "parts"
    folder.mkdir()
    floats = write_gguf(folder / "model.gguf", fields, weights_of(fields), per_part=8)
    parts = sorted(folder.iterdir())
    assert len(parts) == 3
    whole = write_folder(tmp_path / "folder", fields, floats)
    for given_path in (folder, parts[0], parts[2]):
        assert find_gguf(given_path) == parts[0]
    assert_same(parts[0], whole)
    assert open_checkpoint(folder).files == parts
    parts[1].unlink()
    with pytest.raises(ValueError, match=rf"{parts[1]} is missing; .* is the first of 3 parts"):
        open_checkpoint(folder)
    parts[0].rename(folder / "first.gguf")
    with pytest.raises(ValueError, match=r"first\.gguf is one of 3 parts; expected names such as"):
        open_checkpoint(folder / "first.gguf")
    with pytest.raises(ValueError, match=rf"{parts[0]} is missing; expected beside {parts[2].name}"):
        open_checkpoint(parts[2])


def test_what_stands_for_a_gguf_file(tmp_path: Path) -> None:
    fields, path = config(), tmp_path / "model.gguf"
    write_gguf(path, fields, weights_of(fields))
    assert find_gguf(tmp_path) == path
    assert checkpoint_config(tmp_path) == open_checkpoint(path).config
    (tmp_path / "mmproj-model.gguf").touch()
    assert find_gguf(tmp_path) == path
    blob = tmp_path / "sha256-0123"  # as Ollama names them
    blob.write_bytes(path.read_bytes())
    assert find_gguf(blob) == blob
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF models, model\.gguf and others; give one of the files"):
        find_gguf(tmp_path)
    write_folder(tmp_path, fields)
    assert find_gguf(tmp_path) is None
    with pytest.raises(ValueError, match=r"nothing\.gguf is not a folder; expected .* or a GGUF file"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nothing.gguf")


def test_a_file_is_a_model_by_name(small: Path) -> None:
    """As the commands take it; a name that ends so is never looked for on the hub."""
    assert resolve_model(str(small)) == small
    assert resolve_model(str(small.parent)) == small.parent
    with pytest.raises(ValueError, match=rf"revision is 'main', and {small} is a file"):
        resolve_model(str(small), "main")
    with pytest.raises(ValueError, match=r"model is 'owner/model\.gguf'; expected an existing folder or a hub id"):
        resolve_model("owner/model.gguf")


def test_what_ends_a_turn_ends_the_text(tmp_path: Path) -> None:
    fields, path = config(vocab_size=6), tmp_path / "model.gguf"
    tokens = ["a", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "b"]
    said = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 3, 3, 1, 3, 1]}
    write_gguf(path, fields, weights_of(fields), said={**said, "tokenizer.ggml.eom_token_id": 5})
    # Id 3 is no control token, whatever it looks like.
    assert checkpoint_config(path).eos_token_ids == (2, 5, 4)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba'; expected one of granite, llama, qwen2"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; only models without are supported"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; expected a positive whole number"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\]; expected the same for all layers"),
        ({"llama.attention.value_length": 8}, "value_length is 8; expected 16, as of keys"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor is 0.5; expected 1.0 for this model_type"),
        ({"llama.rope.dimension_count": 18}, "rope.dimension_count is 18; expected at most the 16 of a head"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; expected 'none', 'linear' or"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.attn_factor": 2.0,
            },
            "llama.rope.scaling.attn_factor is 2.0; expected none",
        ),
        ({"llama.attention.sliding_window": 8}, "sliding_window is 8; only attention to all 64 positions"),
        ({"llama.attention.causal": False}, "is_causal is False; only True is supported"),
        ({"llama.block_count": 3}, r"lacks tensor blk.2.attn_k.weight \(and 8 more\), which its metadata asks for"),
        ({"llama.block_count": 1}, "has unexpected tensor blk.1.attn_k.weight"),
        ({"llama.feed_forward_length": 95}, r"blk.0.ffn_gate.weight in .* has shape \(96, 64\); expected \(95, 64\)"),
        ({"llama.vocab_size": 66}, r"token_embd.weight in .* has shape \(67, 64\); expected \(66, 64\)"),
    ],
)
def test_metadata_that_is_not_here_or_not_the_tensors_is_refused(
    tmp_path: Path, said: Mapping[str, Any], message: str
) -> None:
    fields, path = config(), tmp_path / "model.gguf"
    write_gguf(path, fields, weights_of(fields), said=said)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    fields, path = config(), tmp_path / "model.gguf"
    tensors = weights_of(fields)
    write_gguf(path, fields, tensors, more={"rope_freqs.weight": np.ones(7, np.float32)})
    with pytest.raises(ValueError, match=rf"rope_freqs.weight in {path} has shape \(7,\); expected \(8,\)"):
        open_checkpoint(path)
    write_gguf(path, fields, tensors)
    whole = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes, and those
    for number, message in ((9, "has type Q8_1: .*not yet implemented"), (77, "has type 77, which the gguf package")):
        path.write_bytes(whole[:kind] + struct.pack("<I", number) + whole[kind + 4 :])
        with pytest.raises(ValueError, match=rf"tensor blk\.0\.attn_v\.weight in {path} {message}"):
            open_checkpoint(path)
    path.write_bytes(whole[: -TINY["hidden_size"] * 4])
    with pytest.raises(ValueError, match=rf"{path} is not a readable GGUF file: it ends inside tensor "):
        open_checkpoint(path)


def test_a_number_that_is_not_finite_is_found(tmp_path: Path) -> None:
    fields, path = config(), tmp_path / "model.gguf"
    tensors = weights_of(fields)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    write_gguf(path, fields, tensors)
    with pytest.raises(ValueError, match=rf"blk\.1\.ffn_up\.weight in {path} holds inf at \(3, 5\)"):
        open_checkpoint(path).check_finite(progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    fields = config(num_hidden_layers=1, vocab_size=3)
    write_gguf(path, fields, weights_of(fields), said={"tokenizer.ggml.tokens": ["a", "b", "c"]})
    return path


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2500), octet=st.integers(0, 255), shorten=st.booleans())
def test_a_damaged_header_is_refused_or_read(small: Path, cut: int, octet: int, *, shorten: bool) -> None:
    """Whatever is cut off is missed, and what is changed leads to no other kind of error."""
    data = small.read_bytes()
    path = small.with_name("damaged.gguf")
    path.write_bytes(data[:cut] if shorten else data[:cut] + bytes([octet]) + data[cut + 1 :])
    reads = pytest.raises(ValueError, match=re.escape(str(path))) if shorten else contextlib.suppress(ValueError)
    with reads:
        GGUFCheckpoint(path).block(0)


def test_other_files_are_no_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in (
        (b"PK\x03\x04", "is not a GGUF file: it does not begin with GGUF"),
        (b"", "is not a GGUF file"),
        (b"GGUF", "ends inside its header"),
        (b"GGUF" + struct.pack("<I", 1), "is GGUF version 1; expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is GGUF version 50331648; expected 2 or 3, little-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            AutoModelForCausalLM.from_pretrained(path)


def test_without_the_package_the_error_says_what_to_install(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'fireq-jax\[gguf\]'"):
        open_checkpoint(small)


def test_headers_are_what_the_package_reads(small: Path) -> None:
    theirs, ours = gguf.GGUFReader(small), GGUFFile.open(small)
    found = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert found.keys() == ours.metadata.keys()
    for key, value in ours.metadata.items():
        assert value == (pytest.approx(found[key]) if isinstance(value, float) else found[key])
    assert len(theirs.tensors) == len(ours.tensors)
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape.tolist()[::-1])
