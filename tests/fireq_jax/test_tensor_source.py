"""What is read from a checkpoint can be written back, in every family."""

import numpy as np
import pytest
from tiny_families import CASES, RENAMED, family_fields
from tiny_llama import weights_of

from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.block import fuse_block, split_block
from fireq_jax.models.coded_weight import CodedWeight
from fireq_jax.models.tensor_source import TensorSource, written


@pytest.mark.parametrize("case", [*CASES, *RENAMED])
def test_a_block_and_the_rest_can_be_written_back(case: str) -> None:
    """Fused, split again and written: the checkpoint's tensors, but for a factor's or an offset's rounding."""
    fields = family_fields(case)
    config, tensors = config_from_huggingface(fields), weights_of(fields)
    table = tensor_table(fields, config)
    prefix = table.prefix.format(index=0)
    block = {
        ours: source.read(*(tensors[prefix + name] for name in source.names)) for ours, source in table.block.items()
    }
    model = {name: np.asarray(tensor) for name, tensor in fuse_block(block).items()}
    result = {prefix + name: tensor for name, tensor in written(table.block, split_block(model, config)).items()}
    outside = {ours: source.read(tensors[source.name]) for ours, source in table.outside.items()}
    result |= written(table.outside, outside)
    assert set(result) == {
        name for name in tensors if not name.startswith(table.prefix.split("{")[0]) or prefix in name
    }
    for name, tensor in result.items():
        assert isinstance(tensor, np.ndarray)
        np.testing.assert_allclose(tensor, tensors[name], rtol=1e-6, atol=1e-6)


def codes_of(rows: int, columns: int, group: int | None, seed: int = 0) -> CodedWeight:
    rng = np.random.default_rng(seed)
    scale = None if group is None else rng.uniform(1, 2, (rows, columns // group)).astype(np.float32)
    values = rng.integers(-7, 8, (rows, columns)).astype(np.int8)
    return CodedWeight(values, scale, rng.uniform(1, 2, rows).astype(np.float32), "int4", group)


def test_codes_stay_codes_where_rows_move() -> None:
    """Two parts of one tensor, in another order, one of them padded."""
    order = np.random.default_rng(1).permutation(12)
    sources = {
        "a": TensorSource("both", (12, 128), rows=order[:5]),
        "b": TensorSource("both", (12, 128), rows=np.append(order[5:], -1), scale=0.5),
    }
    theirs = codes_of(12, 128, 64)
    parts = {name: source.read(theirs) for name, source in sources.items()}
    assert all(isinstance(part, CodedWeight) for part in parts.values())
    back = written(sources, parts)["both"]
    assert isinstance(back, CodedWeight)
    for field in ("values", "group_scale", "channel_scale"):
        np.testing.assert_array_equal(getattr(back, field), getattr(theirs, field))


def test_columns_that_move_keep_codes_only_without_groups() -> None:
    columns = np.append(np.random.default_rng(1).permutation(128), [-1] * 128)
    source = TensorSource("w", (6, 128), columns=columns)
    for group in (None, 128):
        theirs = codes_of(6, 128, group)
        wide = CodedWeight(
            np.pad(theirs.values, ((0, 0), (0, 128)))[:, np.where(columns < 0, 128, columns)],
            None if group is None else np.ones((6, 2), np.float32), theirs.channel_scale, "int4", group,
        )  # fmt: skip
        back = written({"w": source}, {"w": wide})["w"]
        assert isinstance(back, CodedWeight) == (group is None)
        if isinstance(back, CodedWeight):
            np.testing.assert_array_equal(back.values, theirs.values)


@pytest.mark.parametrize(
    ("rows", "said"), [([0, -1], "padding hold something"), ([0, 0], "numbers of their own")], ids=["padding", "shared"]
)
def test_what_a_checkpoint_has_no_place_for_is_refused(rows: list[int], said: str) -> None:
    source = TensorSource("w", (1, 3), rows=np.array(rows))
    with pytest.raises(ValueError, match=f"tensor w: .*{said}"):
        written({"w": source}, {"w": np.arange(6, dtype=np.float32).reshape(2, 3) + 1})
