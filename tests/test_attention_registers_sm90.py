"""The attention kernels' register code, run for all 128 threads of a warpgroup at once in numpy."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import attention_registers_sm90 as registers
from pallas_kernels import formats
from pallas_kernels.decode_attention_sm90 import HEAD_DIMS

WARPGROUP = 128


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [128, 256])
def test_fragments_of_codes_and_probabilities(monkeypatch, head_dim, tokens):
    """K in Q's channel order; V^T and P in one token order; O's rows back in channel order."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (tokens, head_dim)).astype(np.int8)
    machine = Machine(monkeypatch, np.asarray(formats.pack_int4(jnp.asarray(codes))))
    keys = machine.operand(registers.load_keys(None, machine.ref, head_dim=head_dim))
    np.testing.assert_array_equal(keys / registers.CODE_UNIT, registers.permute_channels(jnp.asarray(codes)))
    values = machine.operand(registers.load_values(None, machine.ref, head_dim=head_dim))

    p = rng.integers(0, 8, (tokens, 16)).astype(np.float32)
    machine = Machine(monkeypatch, np.zeros((2, tokens // 128, 8, 128), np.uint8))
    registers.store_probabilities(None, machine.accumulator(p), machine.ref)
    stored = machine.unswizzled().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    out = registers.restore_channels(jnp.asarray(values @ stored.T / registers.CODE_UNIT))
    np.testing.assert_allclose(out, codes.T.astype(np.float32) @ p)


def test_fragments_of_prefill(monkeypatch):
    """P's operand has the tokens' permuted order, and so have the numbers loaded for its columns."""
    p = np.random.default_rng(0).integers(0, 8, (64, 32)).astype(np.float32)
    numbers = np.arange(32, dtype=np.float32)
    machine = Machine(monkeypatch, np.asarray(registers.permute_tokens(jnp.asarray(numbers))))
    operand = machine.operand(registers.probabilities_to_operand(None, machine.accumulator(p)))
    np.testing.assert_array_equal(operand, registers.permute_tokens(jnp.asarray(p)))
    loaded = registers.load_columns(None, machine.ref)
    for block, pair in enumerate(loaded.reshape(4)):
        for e in range(2):
            np.testing.assert_array_equal(pair[e], 8 * block + 2 * machine.q + e)


class Machine:
    """Stands in for the MLIR dialects: a value is a numpy array with one entry a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: np.ndarray):
        self.memory = np.ascontiguousarray(memory).view(np.uint8).reshape(-1)
        self.ref = types.SimpleNamespace(type=types.SimpleNamespace(shape=memory.shape))
        thread = np.arange(WARPGROUP)
        self.w, self.g, self.q = thread // 32, thread % 32 // 4, thread % 4
        dialect = types.SimpleNamespace
        operations = {
            "addi": np.add, "muli": np.multiply, "andi": np.bitwise_and, "ori": np.bitwise_or, "xori": np.bitwise_xor,
            "shli": np.left_shift, "shrui": np.right_shift, "divui": np.floor_divide, "remui": np.remainder,
            "extui": lambda _, x: x,
        }  # fmt: skip
        stand_ins = {
            "arith": dialect(**operations),
            "llvm": dialect(load=self.load, store=self.store),
            "vector": dialect(from_elements=lambda _, elements: elements),
            "utils": dialect(
                memref_ptr=lambda ref: 0, getelementptr=lambda base, offset, _: base + offset[0], prmt=self.prmt,
                thread_idx=lambda: thread.astype(np.uint32), bitcast=self.bitcast,
            ),
            "ir": dialect(
                IntegerType=dialect(get_signless=lambda bits: bits), MemRefType=lambda ref_type: ref_type,
                VectorType=dialect(get=lambda shape, of: of * shape[0] if isinstance(of, int) else of),
                F32Type=dialect(get=lambda: np.float32), Float8E4M3FNType=dialect(get=lambda: 8),
            ),
            "mgpu": dialect(
                WGMMA_LAYOUT_8BIT=dialect(registers_shape=lambda shape: (shape[0] // 64, shape[1] // 16, 2)),
                WGMMA_COL_LAYOUT=dialect(registers_shape=lambda shape: (shape[0] // 8,)),
                FragmentedArray=lambda _registers, _layout, _is_signed: _registers,
            ),
            "_i32": lambda value: np.full(WARPGROUP, value & 0xFFFFFFFF, np.uint32),
            "_element": lambda vector, i: vector[i],
            "_to_e4m3_word": self.to_e4m3_word,
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(registers, name, stand_in)

    def load(self, bits, offset, alignment):
        assert not (offset % alignment).any()
        size = bits // 8
        loaded = self.memory[offset.astype(int)[:, None] + np.arange(size)]
        if size < 4:
            loaded = np.pad(loaded, ((0, 0), (0, 4 - size)))
        words = np.ascontiguousarray(loaded).view(np.uint32)
        return list(words.T) if size > 4 else words[:, 0]

    def store(self, word, offset, alignment):
        assert not (offset % alignment).any()
        assert len(set(offset.tolist())) == WARPGROUP
        self.memory[offset.astype(int)[:, None] + np.arange(4)] = word[:, None].view(np.uint8)

    @staticmethod
    def prmt(a, b, selector):
        pool = np.stack([a, b], axis=1).view(np.uint8)
        picked = pool[:, [int(selector[0]) >> 4 * i & 7 for i in range(4)]]
        return np.ascontiguousarray(picked).view(np.uint32)[:, 0]

    @staticmethod
    def bitcast(word, new_type):
        return word.view(np.float32) if new_type is np.float32 else word

    @staticmethod
    def to_e4m3_word(elements):
        columns = [np.asarray(x, ml_dtypes.float8_e4m3fn).view(np.uint8) for x in elements]
        return np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint32)[:, 0]

    def operand(self, tiles: np.ndarray) -> np.ndarray:
        """Registers in WGMMA_8BIT layout as the matrix they hold."""
        out = np.zeros((64 * tiles.shape[0], 16 * tiles.shape[1]), np.uint8)
        for (m, column, h), word in np.ndenumerate(tiles):
            for e in range(4):
                out[64 * m + 16 * self.w + 8 * h + self.g, 16 * column + 4 * self.q + e] = word >> 8 * e & 255
        return out.view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    def accumulator(self, matrix: np.ndarray):
        """A float32 matrix in WGMMA layout."""
        held = np.empty((matrix.shape[0] // 64, matrix.shape[1] // 8, 2), dtype=object)
        for m, column, h in np.ndindex(held.shape):
            row = 64 * m + 16 * self.w + 8 * h + self.g
            held[m, column, h] = [matrix[row, 8 * column + 2 * self.q + e] for e in range(2)]
        return types.SimpleNamespace(shape=matrix.shape, registers=held)

    def unswizzled(self) -> np.ndarray:
        """Shared memory [N/8, tokens/128, 8, 128] with 128-byte swizzle as [N, tokens]."""
        shape = self.ref.type.shape
        chunks = self.memory.reshape(*shape[:3], 8, 16)
        row, chunk = np.indices((8, 8))
        straight = chunks[:, :, row, chunk ^ row]
        return straight.reshape(shape).transpose(0, 2, 1, 3).reshape(8 * shape[0], 128 * shape[1])
