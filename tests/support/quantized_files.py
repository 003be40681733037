"""Tiny checkpoints in the formats of others, written by their published layouts, and the floats that they stand for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
}  # fmt: skip
Parts = dict[str, np.ndarray]


class Stored(NamedTuple):
    """A weight's tensors by suffix, and the float32 weight that they stand for."""

    parts: Parts
    dense: np.ndarray


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, of dtypes too that its own writer for NumPy does not know."""
    header, start = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]
        }  # fmt: skip
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_quantized(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    store: Callable[[np.ndarray], Stored],
    said: Mapping[str, Any],
    file: str = "config.json",
    ignore: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Two folders: all linear layers but those with ``ignore`` in their names stored so, and the floats for them.

    ``said`` is the config's ``quantization_config``, or all of another ``file``.
    """
    written, floats = {}, {}
    for name, array in tensors.items():
        linear = array.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight")
        if linear and not any(part in name for part in ignore):
            stored = store(array)
            written |= {name.removesuffix(".weight") + suffix: part for suffix, part in stored.parts.items()}
            floats[name] = stored.dense.astype(np.float32)
        else:
            written[name] = floats[name] = array
    for name, content, fields in (("quantized", written, said), ("float", floats, None)):
        here = folder / name
        here.mkdir(parents=True, exist_ok=True)
        own = dict(config)
        if fields is not None and file == "config.json":
            own["quantization_config"] = fields
        elif fields is not None:
            (here / file).write_text(json.dumps(fields))
        (here / "config.json").write_text(json.dumps(own))
        write_safetensors(here / "model.safetensors", content)
    return folder / "quantized", folder / "float"


# --- integers -------------------------------------------------------------------------------------------


def pack(nibbles: np.ndarray, order: list[int] | None = None, bits: int = 4) -> np.ndarray:
    """int32 words along the last axis: number ``order[i]`` of a word's is at bit ``bits * i``."""
    count = 32 // bits
    grouped = np.pad(nibbles, ((0, 0), (0, -nibbles.shape[1] % count))).astype(np.uint32)
    grouped = grouped.reshape(len(nibbles), -1, count)[..., order or list(range(count))]
    return (grouped << (bits * np.arange(count, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32).view(np.int32)


def grouped(weight: np.ndarray, group: int | None) -> np.ndarray:
    """[N, G, g]; the last group is filled up with zeros."""
    n, k = weight.shape
    group = group or k
    return np.pad(weight, ((0, 0), (0, -k % group))).reshape(n, -1, group)


def integers(
    weight: np.ndarray, group: int | None, dtype: Any, *, bits: int = 4, low: int | None = None, asym: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales and zero points [N, G], and the weight; symmetric ones reach down to ``low``."""
    blocks, half = grouped(weight, group), 2 ** (bits - 1)
    largest, least = blocks.max(axis=-1), blocks.min(axis=-1)
    if asym:
        scale = np.maximum((largest - least) / (2 * half - 1), 1e-6).astype(dtype).astype(np.float32)
        zero = np.clip(np.round(-least / scale) - half, -half, half - 1)
    else:
        low = -(half - 1) if low is None else low
        scale = (np.abs(blocks).max(axis=-1) / (half - 1 if low > -half else half - 0.5)).astype(dtype)
        scale, zero = scale.astype(np.float32), np.zeros_like(largest)
    codes = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], low or -half, half - 1)
    dense = (codes - zero[..., None]) * scale[..., None]
    shape, k = (len(weight), -1), weight.shape[1]
    return codes.reshape(shape)[:, :k].astype(int), scale, zero.astype(int), dense.reshape(shape)[:, :k]


def compressed_int(
    group: int | None = 128, *, bits: int = 4, packed: bool = True, low: int | None = None, asym: bool = False,
    dtype: Any = BF16,
) -> Callable[[np.ndarray], Stored]:  # fmt: skip
    """compressed-tensors: packed along K, or int8; zero points are packed along N."""

    def store(weight: np.ndarray) -> Stored:
        codes, scale, zero, dense = integers(weight, group, dtype, bits=bits, low=low, asym=asym)
        half = 2 ** (bits - 1)
        parts = {".weight_scale": scale.astype(dtype)}
        if packed:
            parts[".weight_packed"] = pack(codes + half, bits=bits)
            parts[".weight_shape"] = np.array(weight.shape)
        else:
            parts[".weight"] = codes.astype(np.int8)
        if asym:
            parts[".weight_zero_point"] = pack((zero + half).T, bits=bits).T if packed else zero.astype(np.int8)
        return Stored(parts, dense)

    return store


def compressed_config(
    form: str, *, num_bits: int = 4, kind: str = "int", group: int | None = 128, inputs: Any = None, **weights: Any
) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors with one group of layers."""
    given = {
        "num_bits": num_bits, "type": kind, "symmetric": True, "strategy": "channel" if group is None else "group",
        "group_size": group, "block_structure": None, "dynamic": False, "actorder": None, **weights,
    }  # fmt: skip
    targets = {"targets": ["Linear"], "weights": given, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": targets},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.20.1",
    }  # fmt: skip


def gptq(
    group: int | None = 128,
    *,
    bits: int = 4,
    sym: bool = True,
    offset: int = 1,
    order: bool = False,
    index: bool = True,
) -> Callable[[np.ndarray], Stored]:
    """Packed along K, [K, N]; ``offset`` 1 is GPTQ's first version. ``order`` mixes the groups' columns."""

    def store(weight: np.ndarray) -> Stored:
        columns = np.random.default_rng(0).permutation(weight.shape[1]) if order else np.arange(weight.shape[1])
        codes, scale, zero, dense = integers(weight[:, columns], group, np.float16, bits=bits, asym=not sym)
        half, back = 2 ** (bits - 1), np.argsort(columns)
        parts = {
            ".qweight": np.ascontiguousarray(pack(codes[:, back] + half, bits=bits).T),
            ".qzeros": pack(zero.T + half - offset, bits=bits),
            ".scales": np.ascontiguousarray(scale.T.astype(np.float16)),
        }
        if index:
            parts[".g_idx"] = (back // (group or weight.shape[1])).astype(np.int32)
        return Stored(parts, dense[:, back])

    return store


def gptq_config(group: int | None = 128, **changes: Any) -> dict[str, Any]:
    """``quantization_config`` of GPTQ."""
    size = -1 if group is None else group
    return {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True, "desc_act": False, **changes}


def awq(group: int = 128) -> Callable[[np.ndarray], Stored]:
    """Packed along N in AWQ's order, [K, N]."""

    def store(weight: np.ndarray) -> Stored:
        codes, scale, zero, dense = integers(weight, group, np.float16, asym=True)
        parts = {
            ".qweight": pack(codes.T + 8, AWQ_ORDER),
            ".qzeros": pack(zero.T + 8, AWQ_ORDER),
            ".scales": np.ascontiguousarray(scale.T.astype(np.float16)),
        }
        return Stored(parts, dense)

    return store


def modelopt_int4(group: int = 128) -> Callable[[np.ndarray], Stored]:
    """Rows 2 i and 2 i + 1 in a byte, as two's complement, and a vector that inputs are multiplied by."""

    def store(weight: np.ndarray) -> Stored:
        vector = np.exp(0.2 * np.random.default_rng(0).standard_normal(weight.shape[1])).astype(BF16)
        codes, scale, _, dense = integers(weight / vector.astype(np.float32), group, np.float32, low=-8)
        octets = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8)
        parts = {
            ".weight": octets, ".weight_scale": scale, ".weight_scale_2": np.float32(0.1).reshape(()),
            ".input_scale": np.float32(0.1).reshape(()), ".pre_quant_scale": vector,
        }  # fmt: skip
        return Stored(parts, dense * vector.astype(np.float32))

    return store


# --- floats ----------------------------------------------------------------------------------------------


def blocks_of(weight: np.ndarray, rows: int | None, columns: int | None) -> np.ndarray:
    """The largest magnitude of each weight's block, and of each block."""
    n, k = weight.shape
    rows, columns = rows or n, columns or k
    padded = np.pad(np.abs(weight), ((0, -n % rows), (0, -k % columns)))
    return padded.reshape(-(-n // rows), rows, -(-k // columns), columns).max(axis=(1, 3))


def spread(scale: np.ndarray, rows: int | None, columns: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """A block's scale for each weight."""
    whole = np.repeat(np.repeat(scale, rows or shape[0], axis=0), columns or shape[1], axis=1)
    return whole[: shape[0], : shape[1]].astype(np.float32)


def fp8(
    rows: int | None, columns: int | None, *, name: str = ".weight_scale", dtype: Any = np.float32,
    shape: tuple[int, ...] | None = None, inputs: bool = False,
) -> Callable[[np.ndarray], Stored]:  # fmt: skip
    """E4M3 with a scale for each block; None is all rows or columns."""

    def store(weight: np.ndarray) -> Stored:
        largest = blocks_of(weight, rows, columns) / 448
        scale = (2 ** np.ceil(np.log2(largest)) if dtype == ml_dtypes.float8_e8m0fnu else largest).astype(dtype)
        each = spread(scale.astype(np.float32), rows, columns, weight.shape)
        values = (weight / each).astype(E4M3)
        parts = {".weight": values, name: scale if shape is None else scale.reshape(shape)}
        if inputs:
            parts[".input_scale"] = np.float32(0.1).reshape(())
        return Stored(parts, values.astype(np.float32) * each)

    return store


def e2m1(weight: np.ndarray) -> np.ndarray:
    """The nearest of E2M1's numbers, as 4 bits."""
    return np.abs(weight[..., None] - E2M1).argmin(axis=-1).astype(np.uint8)


def octets(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Two codes a byte along the last axis."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return (second | first << 4) if high_first else (first | second << 4)


def mxfp4(weight: np.ndarray) -> Stored:
    """compressed-tensors: E2M1 in groups of 32 with scales that are powers of two."""
    power = np.floor(np.log2(np.maximum(blocks_of(weight, 1, 32), 2.0**-100))) - 2
    each = spread(2.0**power, 1, 32, weight.shape)
    codes = e2m1(weight / each)
    parts = {".weight_packed": octets(codes), ".weight_scale": (power + 127).astype(np.uint8)}
    return Stored(parts, E2M1[codes] * each)


def nvfp4(weight: np.ndarray, *, modelopt: bool = False) -> Stored:
    """E2M1 in groups of 16 with E4M3 scales, and one number for all."""
    above = np.float32(6 * 448 / np.abs(weight).max())
    scale = (blocks_of(weight, 1, 16) / 6 * above).astype(E4M3)
    scale = np.where(scale == 0, E4M3(0.001953125), scale)
    if modelopt:
        above = np.float32(1) / above
    factor = above if modelopt else 1 / above
    each = spread(scale.astype(np.float32) * factor, 1, 16, weight.shape)
    codes = e2m1(weight / each)
    if modelopt:
        return Stored(
            {".weight": octets(codes), ".weight_scale": scale, ".weight_scale_2": np.array(above)}, E2M1[codes] * each
        )
    parts = {".weight_packed": octets(codes), ".weight_scale": scale, ".weight_global_scale": np.array([above])}
    return Stored(parts, E2M1[codes] * each)


def nf4(*, nested: bool) -> Callable[[np.ndarray], Stored]:
    """bitsandbytes: blocks of 64 of the flattened matrix, numbers of a table, the first in a byte's high half."""
    table = np.linspace(-1, 1, 16).astype(np.float32) ** 3
    table /= np.abs(table).max()

    def store(weight: np.ndarray) -> Stored:
        blocks = weight.reshape(-1, 64)
        absmax = np.abs(blocks).max(axis=1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts = {".weight.quant_map": table, ".weight.absmax": absmax}
        if nested:
            offset, numbers = absmax.mean(), np.linspace(-1, 1, 256).astype(np.float32)
            padded = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
            above = np.abs(padded).max(axis=1)
            codes = np.abs((padded / above[:, None])[..., None] - numbers).argmin(axis=-1).astype(np.uint8)
            codes = codes.reshape(-1)[: len(absmax)]
            parts |= {".weight.absmax": codes, ".weight.nested_absmax": above, ".weight.nested_quant_map": numbers}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
            absmax = numbers[codes] * np.repeat(above, 256)[: len(codes)] + offset
        codes = np.abs((blocks / absmax[:, None])[..., None] - table).argmin(axis=-1).astype(np.uint8)
        parts[".weight"] = octets(codes.reshape(1, -1), high_first=True).reshape(-1, 1)
        parts[".weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return Stored(parts, (table[codes] * absmax[:, None]).reshape(weight.shape))

    return store


def bnb_int8(weight: np.ndarray) -> Stored:
    """bitsandbytes in 8 bits."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    codes = np.round(weight / largest[:, None] * 127).astype(np.int8)
    parts = {".weight": codes, ".SCB": largest, ".weight_format": np.array(0, np.uint8)}
    return Stored(parts, codes * (largest / 127)[:, None])
