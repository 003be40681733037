"""From a checkpoint's tensor to one of a block's: rows and columns in another order, padding, factors; and back.

Kept as data rather than as functions, so that a reader can do the same to codes and scales as to floats.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fireq_jax.models.coded_weight import CodedWeight, HostTensor, as_float, coded_alike


@dataclasses.dataclass(frozen=True, eq=False)
class TensorSource:
    """Where a tensor is in a checkpoint, and how it is read: ``scale * (theirs[rows][:, columns] + offset)``.

    Attributes:
        name: in the checkpoint; of a block's tensor without the block's prefix. With "{expert}" in it one tensor
            for each of a ``stack``.
        shape: in the checkpoint.
        rows, columns: the checkpoint's index of each row and column, -1 for zeros; None means as they are.
        scale, offset: applied in float32 to all that is not padding.
        reshaped: the final shape, where it is another.
        stack: how many matrices (or vectors) of which all this holds the tensor is: the checkpoint's tensors of
            as many names, or its first axis. None means one.
        transposed: whether the checkpoint's matrices are [columns, rows]. Codes never are.
    """

    name: str
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    scale: float = 1.0
    offset: float = 0.0
    reshaped: tuple[int, ...] | None = None
    stack: int | None = None
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that it is made of."""
        return tuple(dict.fromkeys(self.name.format(expert=i) for i in range(self.stack or 1)))

    def read(self, *tensors: HostTensor) -> HostTensor:
        """The block's tensor of those called ``names``; in their dtype where no number changes, else float32.

        Codes stay codes if all are, and can follow (:meth:`keeps`).
        """
        first = tensors[0]
        if isinstance(first, CodedWeight) and coded_alike(tensors) and self.keeps(first.group_size):
            return self._read_codes([tensor for tensor in tensors if isinstance(tensor, CodedWeight)])
        arrays = [np.asarray(as_float(tensor)) for tensor in tensors]
        return self._read_floats(arrays, transposed=self.transposed and not isinstance(first, CodedWeight))

    def keeps(self, group_size: int | None) -> bool:
        """Whether codes in groups of so many inputs, or without groups, can be read as codes.

        Not where something is added to them, or where columns move from group to group.
        """
        moved = self.columns is not None and not np.array_equal(self.columns, np.arange(self.shape[-1]))
        return not self.offset and self.scale > 0 and self.reshaped is None and not (moved and group_size)

    def _read_codes(self, tensors: list[CodedWeight]) -> CodedWeight:
        coded = tensors[0]
        if "{expert}" in self.name:
            arrays = [(each.values, each.group_scale, each.channel_scale) for each in tensors]
            values, group, channel = (None if part[0] is None else np.stack(part) for part in zip(*arrays, strict=True))
            coded = dataclasses.replace(coded, values=values, group_scale=group, channel_scale=channel)
        if self.columns is not None:
            coded = dataclasses.replace(coded, values=_take(coded.values, self.columns, coded.values.ndim - 1))
        if self.scale != 1:
            coded = dataclasses.replace(coded, channel_scale=coded.channel_scale * np.float32(self.scale))
        return coded if self.rows is None else coded.take_rows(self.rows)

    def _read_floats(self, tensors: list[np.ndarray], *, transposed: bool) -> np.ndarray:
        tensor = np.stack(tensors) if "{expert}" in self.name else tensors[0]
        if self.offset or self.scale != 1:
            tensor = (tensor.astype(np.float32) + np.float32(self.offset)) * np.float32(self.scale)
        if transposed:
            tensor = tensor.swapaxes(-2, -1)
        for axis, index in enumerate((self.rows, self.columns), start=0 if self.stack is None else 1):
            if index is not None:
                tensor = _take(tensor, index, axis)
        return tensor if self.reshaped is None else tensor.reshape(self.reshaped)

    def _put(self, whole: np.ndarray, tensor: np.ndarray, row_axis: int, column_axis: int | None) -> None:
        """Write a block's tensor to where it is in the checkpoint's.

        Raises:
            ValueError: if padding holds something, or what is one number in the checkpoint is several here.
        """
        if column_axis is not None and self.columns is not None:
            shape = list(tensor.shape)
            shape[column_axis] = whole.shape[column_axis]
            wide = np.zeros(shape, tensor.dtype)
            _scatter(wide, tensor, self.columns, column_axis)
            tensor = wide
        if self.rows is None:
            whole[...] = tensor
        else:
            _scatter(whole, tensor, self.rows, row_axis)


@dataclasses.dataclass(frozen=True, eq=False)
class TensorTable:
    """All tensors of a model: this project's names and where they come from.

    Attributes:
        prefix: what names of a block's tensors begin with, with "{index}" for the block's number.
        block: the same for every block.
        outside: those that belong to none.
    """

    prefix: str
    block: Mapping[str, TensorSource]
    outside: Mapping[str, TensorSource]

    def shapes(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint of so many layers has."""
        shapes = {source.name: source.shape for source in self.outside.values()}
        for index in range(layers):
            prefix = self.prefix.format(index=index)
            shapes |= {prefix + name: source.shape for source in self.block.values() for name in source.names}
        return shapes


def _take(tensor: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    if np.array_equal(index, np.arange(tensor.shape[axis])):
        return tensor
    taken = np.take(tensor, np.maximum(index, 0), axis=axis)
    if (index < 0).any():
        taken[(slice(None),) * axis + (index < 0,)] = 0
    return taken


def _scatter(whole: np.ndarray, tensor: np.ndarray, index: np.ndarray, axis: int) -> None:
    """The inverse of :func:`_take`."""
    there = index >= 0
    if np.compress(~there, tensor, axis).any():
        raise ValueError("channels that are padding hold something, which the checkpoint has no place for")
    target = np.moveaxis(whole, axis, 0)
    target[index[there]] = values = np.moveaxis(np.compress(there, tensor, axis), axis, 0)
    if not np.array_equal(target[index[there]], values):
        raise ValueError("heads have numbers of their own, where the checkpoint has one for all")


def written(sources: Mapping[str, TensorSource], tensors: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
    """The checkpoint's tensors that ``sources`` read ``tensors`` from: the inverse of :meth:`TensorSource.read`.

    Codes stay codes where they can be read as such (:meth:`TensorSource.keeps`), else they become float32.

    Args:
        sources: by the block's names, all that a checkpoint's tensor is made into.
        tensors: of these names.

    Raises:
        ValueError: naming a tensor that the checkpoint's form cannot hold.
    """
    names: dict[str, list[str]] = {}
    for ours, source in sources.items():
        names.setdefault(source.name, []).append(ours)
    result: dict[str, HostTensor] = {}
    for name, group in names.items():
        pieces, values = [sources[ours] for ours in group], [tensors[ours] for ours in group]
        try:
            whole = _written(pieces, values)
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error
        if "{expert}" in name:
            result |= {each: jax.tree.map(lambda array, i=i: array[i], whole) for i, each in enumerate(pieces[0].names)}
        else:
            result[name] = whole
    return result


def _written(sources: Sequence[TensorSource], tensors: Sequence[HostTensor]) -> HostTensor:
    first, example = sources[0], tensors[0]
    stack = (first.stack,) if "{expert}" in first.name and first.stack is not None else ()
    if (
        isinstance(example, CodedWeight)
        and coded_alike(tensors)
        and not any(source.transposed or not source.keeps(example.group_size) for source in sources)
    ):
        codes = [tensor for tensor in tensors if isinstance(tensor, CodedWeight)]
        return _written_codes(sources, codes, (*stack, *first.shape))
    shape = (*stack, *first.shape)
    whole = None
    for source, tensor in zip(sources, tensors, strict=True):
        array = np.asarray(as_float(tensor))
        if source.reshaped is not None:
            array = array.reshape(-1, *source.shape[1:])
        if source.offset or source.scale != 1:
            array = array.astype(np.float32) / np.float32(source.scale)
        if whole is None:
            whole = np.zeros(shape, array.dtype)
        rows = 0 if source.stack is None else 1
        view = whole.swapaxes(-2, -1) if source.transposed else whole
        source._put(view, array, rows, rows + 1 if array.ndim > rows + 1 else None)
    assert whole is not None
    return whole - np.float32(first.offset) if first.offset else whole


def _written_codes(
    sources: Sequence[TensorSource], codes: Sequence[CodedWeight], shape: tuple[int, ...]
) -> CodedWeight:
    example = codes[0]
    values = np.zeros(shape, example.values.dtype)
    channel = np.ones(shape[:-1], np.float32)
    group = None if example.group_scale is None else np.ones((*shape[:-1], example.group_scale.shape[-1]), np.float32)
    for source, coded in zip(sources, codes, strict=True):
        axis = len(shape) - 2
        there = slice(None) if source.rows is None else source.rows >= 0
        rows = slice(None) if source.rows is None else source.rows[there]
        source._put(values, np.asarray(coded.values), axis, axis + 1)
        channel[..., rows] = coded.channel_scale[..., there] / np.float32(source.scale)
        if group is not None:
            group[..., rows, :] = coded.group_scale[..., there, :]
    return dataclasses.replace(example, values=values, group_scale=group, channel_scale=channel)
