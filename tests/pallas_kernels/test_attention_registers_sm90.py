"""The attention kernels' register code, run for all 128 threads of a warpgroup at once in numpy."""

import contextlib
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.sm90.attention import registers as shared
from pallas_kernels.sm90.attention.operands import HEAD_DIMS
from pallas_kernels.sm90.decode_attention import combine, registers
from pallas_kernels.sm90.prefill_attention import prepare
from pallas_kernels.sm90.prefill_attention import registers as prefill
from pallas_kernels.sm90.prefill_attention.config import SUM_COLUMNS, SUM_STEP

WARPGROUP = 128
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [128, 256])
def test_decode_multiplies_what_the_cache_holds(monkeypatch, head_dim, tokens):
    """Keys and queries in one channel order; V^T and P in one token order; the output in order again."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (tokens, head_dim)).astype(np.int8)
    length, heads, group, first_row, first_head = 3, 10, 5, 8, 5
    machine = Machine(monkeypatch)
    packed = machine.ref(np.asarray(formats.pack_int4(jnp.asarray(codes))))
    keys = machine.operand(registers.load_keys(None, packed, head_dim=head_dim))

    queries = rng.integers(-8, 9, (length, heads, head_dim)).astype(E4M3)
    width = min(128, head_dim)
    q_smem = machine.ref(np.zeros((1, head_dim // width, 8, width), E4M3))
    start, source = machine.scalar(first_row), machine.ref(queries)
    words = registers.load_queries(None, start, machine.scalar(first_head), source, rows=8, group=group)
    registers.store_queries(None, start, words, q_smem, valid_rows=length * group, head_dim=head_dim)
    rows = np.zeros((8, head_dim), np.float32)
    rows[:7] = queries[:, first_head : first_head + group].reshape(length * group, head_dim)[first_row:]
    scores = keys @ unswizzled(q_smem.memory).astype(np.float32).T / shared.CODE_UNIT
    np.testing.assert_array_equal(scores, codes.astype(np.float32) @ rows.T)

    scales = machine.ref(rng.normal(size=(length, heads)).astype(np.float32))
    loaded = registers.load_row_numbers(
        None, machine.scalar(first_row), machine.scalar(first_head), scales, rows=8, group=group
    )
    expected = scales.memory[:, first_head : first_head + group].reshape(-1)[np.minimum(np.arange(8) + first_row, 14)]
    for e in range(2):
        np.testing.assert_array_equal(loaded.reshape(-1)[0][e], expected[2 * machine.q + e])

    values = machine.operand(registers.load_values(None, packed, head_dim=head_dim))
    p = rng.integers(0, 8, (tokens, 8)).astype(np.float32)
    p_smem = machine.ref(np.zeros((1, tokens // 128, 8, 128), E4M3))
    registers.store_probabilities(None, machine.accumulator(p), p_smem)
    product = values @ unswizzled(p_smem.memory).astype(np.float32).T / shared.CODE_UNIT
    for dtype, exact in ((np.float32, True), (BF16, False)):
        target = machine.ref(np.full((length, heads, head_dim), 77, dtype))
        registers.store_output(
            None, machine.accumulator(product), machine.scalar(first_row), machine.scalar(first_head), target,
            group=group,
        )  # fmt: skip
        wanted = np.full((length, heads, head_dim), 77, np.float32)
        own = wanted[:, first_head : first_head + group].reshape(-1, head_dim)
        own[first_row:] = (codes.T.astype(np.float32) @ p).T[:7]
        wanted[:, first_head : first_head + group] = own.reshape(length, group, head_dim)
        np.testing.assert_allclose(target.memory.astype(np.float32), wanted, rtol=0 if exact else 2**-8)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_combine_weighs_splits(monkeypatch, head_dim):
    """Partial sums of three splits, one of them empty, and a row that saw nothing."""
    rng = np.random.default_rng(0)
    group, heads, rows = 3, 6, 6
    machine = Machine(monkeypatch)
    partial = rng.normal(size=(3, rows, head_dim)).astype(np.float32)
    row_max, row_sum = rng.normal(size=(2, 3, rows)).astype(np.float32) ** 2
    row_max[1], row_sum[1], partial[1] = -np.inf, 0, 0
    row_max[:, 4], row_sum[:, 4], partial[:, 4] = -np.inf, 0, 0
    target = machine.ref(np.zeros((rows // group, heads, head_dim), np.float32))
    refs = [machine.ref(x) for x in (partial, row_max, row_sum)]
    for block in range(-(-rows * head_dim // 512)):
        combine.combine_head(None, machine.scalar(block), machine.scalar(3), *refs, target, group=group)
    weight = np.exp2(row_max - np.where(np.isinf(row_max.max(0)), 0, row_max.max(0)))
    expected = (weight[..., None] * partial).sum(0) / np.maximum((weight * row_sum).sum(0), 1e-30)[:, None]
    expected /= formats.PROBABILITY_SCALE * shared.CODE_UNIT
    got = target.memory[:, 3:].reshape(rows, head_dim)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not target.memory[:, :3].any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_token_is_combined_as_its_heads_are(monkeypatch, head_dim):
    """Two sequences of three tokens, two kv heads of five: eight channels of any token at a time."""
    rng = np.random.default_rng(0)
    batch, length, kv_heads, group, splits = 2, 3, 2, 5, 3
    heads, rows = kv_heads * group, length * group
    machine = Machine(monkeypatch)
    partial = rng.normal(size=(batch, kv_heads, splits, 1, rows, head_dim)).astype(np.float32)
    row_max, row_sum = rng.normal(size=(2, batch, kv_heads, splits, rows)).astype(np.float32) ** 2
    expected = np.zeros((batch, length, heads, head_dim), np.float32)
    for b, kv_head, block in np.ndindex(batch, kv_heads, -(-rows * head_dim // 512)):
        refs = [
            machine.ref(x) for x in (partial[b, kv_head, :, 0], row_max[b, kv_head], row_sum[b, kv_head], expected[b])
        ]
        combine.combine_head(
            None, machine.scalar(block), machine.scalar(kv_head * group), *refs, group=group
        )  # fmt: skip
    sources = {"partial": partial, "row_max": row_max, "row_sum": row_sum}
    refs = {name: machine.ref(x) for name, x in sources.items()}
    refs["values"] = machine.ref(np.zeros((batch * length, heads * head_dim), E4M3))
    chunks = np.arange(batch * length * heads * head_dim // 8, dtype=np.uint32)
    chunks = np.pad(chunks, (0, -len(chunks) % WARPGROUP), mode="edge").reshape(-1, WARPGROUP)
    for threads in chunks:
        token, index = np.divmod(threads, np.uint32(heads * head_dim // 8))
        got = np.stack(combine.combine_channels(refs, token, index, 8), axis=1)
        np.testing.assert_array_equal(got, expected.reshape(-1, 8)[threads])


def test_probabilities_and_columns_have_one_order(monkeypatch):
    p = np.random.default_rng(0).integers(0, 8, (64, 32)).astype(np.float32)
    numbers = np.asarray(prefill.permute_tokens(jnp.arange(32.0)), np.float32)
    machine = Machine(monkeypatch)
    operand = machine.operand(prefill.probabilities_to_operand(None, machine.accumulator(p)))
    np.testing.assert_array_equal(operand, prefill.permute_tokens(jnp.asarray(p)))
    loaded = prefill.load_columns(None, machine.ref(numbers))
    for block, pair in enumerate(loaded.reshape(4)):
        for e in range(2):
            np.testing.assert_array_equal(pair[e], 8 * block + 2 * machine.q + e)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_preparation(monkeypatch, head_dim):
    """Codes and scales of a cache whose last slots are invalid, in the units and the order of the kernel."""
    rng = np.random.default_rng(0)
    slots, length, padded = 200, 190, 256
    codes = rng.integers(-7, 8, (2, slots, head_dim)).astype(np.int8)
    scales = np.exp(rng.normal(size=(2, slots))).astype(BF16)
    scales[:, length:] = np.nan
    machine = Machine(monkeypatch)
    packed = [machine.ref(np.asarray(formats.pack_int4(jnp.asarray(x)))) for x in codes]
    keys, values = (machine.ref(np.full(shape, np.nan, E4M3)) for shape in ((padded, head_dim), (head_dim, padded)))
    columns = machine.ref(np.full((3, padded), np.nan, np.float32))
    for first in range(0, padded, prepare.PREPARED_TOKENS):
        at = machine.scalar(first)
        refs = (*(machine.ref(x) for x in scales), columns, values)
        prepare.prepare_columns(None, at, machine.scalar(length), *refs, sum_columns=False)
        prepare.prepare_keys(None, at, packed[0], keys)
        prepare.prepare_values(None, at, packed[1], values)
    # Back in the tokens' order.
    order = np.argsort(np.asarray(prefill.permute_tokens(jnp.arange(padded))))
    k, v = (x.memory.astype(np.float32) / shared.CODE_UNIT for x in (keys, values))
    numbers = columns.memory[:, order]
    np.testing.assert_array_equal(k[:slots], codes[0])
    np.testing.assert_array_equal(v[:, order[:slots]], codes[1].T)
    assert np.isfinite(k).all()
    assert np.isfinite(v).all()
    k_scale, v_scale = scales[:, :length].astype(np.float32)
    np.testing.assert_allclose(numbers[:, :length], [k_scale, np.log2(v_scale), 1 / v_scale], rtol=1e-6)
    np.testing.assert_array_equal(numbers[:, length:], np.broadcast_to([[1], [0], [1]], (3, padded - length)))


def test_numbers_of_columns_are_stored_as_far_as_there_are_rows(monkeypatch):
    machine = Machine(monkeypatch)
    numbers = types.SimpleNamespace(registers=np.empty((1,), object))
    numbers.registers[0] = [(2 * machine.q + e).astype(np.float32) for e in range(2)]
    target = machine.ref(np.full((14,), 77, np.float32))
    registers.store_column_numbers(None, numbers, machine.scalar(8), target)
    np.testing.assert_array_equal(target.memory, [77] * 8 + list(range(6)))


def unswizzled(memory: np.ndarray) -> np.ndarray:
    """Shared memory [N/8, columns/W, 8, W] with W-byte swizzle (W 64 or 128) as [N, columns]."""
    blocks, tiles, _, width = memory.shape
    chunks = memory.reshape(blocks, tiles, 8, width // 16, 16)
    row, chunk = np.indices((8, width // 16))
    straight = chunks[:, :, row, chunk ^ (row if width == 128 else row // 2)]
    return straight.reshape(memory.shape).transpose(0, 2, 1, 3).reshape(8 * blocks, width * tiles)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("least", [None, 1e-30])
def test_columns_of_sums_add_up_to_the_inverse_scale(monkeypatch, spread, least):
    """To a part of a block's largest; tokens beyond the end count as 1, and one of no size leaves the others be."""
    rng = np.random.default_rng(0)
    slots, length, padded, head_dim = 200, 190, 256, 16
    scales = np.exp(3 + spread * rng.normal(size=(2, slots))).astype(BF16)
    scales[:, length:] = np.nan
    if least is not None:
        scales[1, 100] = least
    machine = Machine(monkeypatch)
    values = machine.ref(np.full((head_dim + SUM_COLUMNS, padded), 1, E4M3))
    columns = machine.ref(np.full((3, padded), np.nan, np.float32))
    for first in range(0, padded, prepare.PREPARED_TOKENS):
        refs = (*(machine.ref(x) for x in scales), columns, values)
        prepare.prepare_columns(None, machine.scalar(first), machine.scalar(length), *refs, sum_columns=True)
    order = np.argsort(np.asarray(prefill.permute_tokens(jnp.arange(padded))))
    weights = SUM_STEP ** -np.arange(SUM_COLUMNS, dtype=np.float32)
    pieces = values.memory.astype(np.float32)
    assert (pieces[:head_dim] == 1).all()
    assert pieces[head_dim:].max() <= 256
    units = columns.memory[2].reshape(2, -1)
    assert (units == units[:, :1]).all()
    expected = np.ones(padded, np.float32)
    expected[:length] = 1 / scales[1, :length].astype(np.float32)
    # An inverse that is out of the block's range is cut.
    expected = np.minimum(expected, 256 * columns.memory[2][order])
    assert (expected[:length] < 1 / scales[1, :length].astype(np.float32)).sum() == (least is not None)
    error = np.abs((weights @ pieces[head_dim:] * columns.memory[2])[order] - expected)
    assert (error <= 2.0**-26 * columns.memory[2][order] + 2.0**-20 * expected).all()


class Machine:
    """Stands in for the MLIR dialects: a value is a numpy array with one entry a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        thread = np.arange(WARPGROUP)
        self.w, self.g, self.q = thread // 32, thread % 32 // 4, thread % 4
        self.active = np.ones(WARPGROUP, bool)
        named = types.SimpleNamespace

        def signed(operation):
            return lambda a, b: operation(a.view(np.int32), b.view(np.int32)).view(np.uint32)

        arith = named(
            addi=np.add, subi=np.subtract, muli=np.multiply, andi=np.bitwise_and, ori=np.bitwise_or,
            xori=np.bitwise_xor, shli=np.left_shift, shrui=np.right_shift, divui=np.floor_divide,
            remui=np.remainder, minui=np.minimum, maxui=np.maximum,
            minsi=signed(np.minimum), maxsi=signed(np.maximum),
            extui=lambda to, x: x.astype(to), trunci=lambda to, x: x.astype(to), truncf=lambda to, x: x.astype(to),
            addf=np.add, subf=np.subtract, mulf=np.multiply, divf=np.divide, maximumf=np.maximum,
            minimumf=np.minimum, select=np.where,
            constant=lambda to, value: np.full(WARPGROUP, value, to),
            cmpi=lambda predicate, a, b: predicate(a, b), cmpf=lambda predicate, a, b: predicate(a, b),
            CmpIPredicate=named(
                ult=np.less, eq=np.equal, slt=lambda a, b: a.view(np.int32) < b.view(np.int32)
            ),
            CmpFPredicate=named(OEQ=np.equal, OGT=np.greater),
        )  # fmt: skip
        stand_ins = {
            "arith": arith,
            "llvm": named(load=self.load, store=self.store),
            "scf": named(IfOp=lambda condition: named(then_block=condition), YieldOp=lambda values: None),
            "vector": named(from_elements=lambda of, elements: list(elements)),
            "utils": named(
                memref_ptr=lambda ref: (ref, np.zeros(WARPGROUP, np.int64)), getelementptr=self.pointer,
                prmt=self.prmt, thread_idx=lambda: thread.astype(np.uint32),
                bitwidth=lambda x: 8 * np.dtype(x).itemsize,
                bitcast=lambda word, to: word.view(to),
            ),
            "ir": named(
                Value=None, Type=None,
                IntegerType=named(get_signless=lambda bits: np.dtype(f"uint{bits}").type),
                MemRefType=lambda ref_type: ref_type, VectorType=named(get=lambda shape, of: (of, shape[0])),
                F32Type=named(get=lambda: np.float32), Float8E4M3FNType=named(get=lambda: E4M3),
                FloatAttr=named(get=lambda _, value: value), InsertionPoint=self.where,
            ),
            "mgpu": named(
                WGMMA_LAYOUT_8BIT=named(registers_shape=lambda shape: (shape[0] // 64, shape[1] // 16, 2)),
                WGMMA_COL_LAYOUT=named(registers_shape=lambda shape: (shape[0] // 8,)),
                FragmentedArray=lambda _registers, _layout, _is_signed: _registers,
                optimization_barrier=lambda array: array,
            ),
            "const": lambda value: np.full(WARPGROUP, value & 0xFFFFFFFF, np.uint32),
            "number": lambda value: np.full(WARPGROUP, value, np.float32),
            "element_of": lambda vector, i: vector[i],
            "fragments": lambda tiles, shape: tiles,
            "query_layout": lambda rows, head_dim: None,
            "raw_array": lambda words, layout: named(registers=named(flat=[[word] for word in words])),
            "_exp2": np.exp2,
            "to_e4m3": self.to_e4m3,
            "_log2": np.log2,
            "_warp_reduce": lambda operation, x: getattr(x.reshape(-1, 32), operation)(1).repeat(32),
        }  # fmt: skip
        for module in (shared, registers, combine, prefill, prepare):
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, stand_in)

    @staticmethod
    def ref(memory: np.ndarray):
        memory = np.ascontiguousarray(memory)
        return types.SimpleNamespace(
            memory=memory, type=types.SimpleNamespace(shape=memory.shape, element_type=memory.dtype.type)
        )

    @staticmethod
    def scalar(value):
        dtype = np.float32 if isinstance(value, (float, np.floating)) else np.uint32
        return types.SimpleNamespace(registers=types.SimpleNamespace(item=lambda: np.full(WARPGROUP, value, dtype)))

    @contextlib.contextmanager
    def where(self, condition):
        outer, self.active = self.active, self.active & condition
        yield
        self.active = outer

    @staticmethod
    def pointer(base, offset, element):
        ref, start = base
        return ref, start + offset[0].astype(np.int64) * np.dtype(element).itemsize

    def load(self, result, pointer, alignment=1):
        ref, offset = pointer
        element, count = result if isinstance(result, tuple) else (result, None)
        assert not (offset[self.active] % alignment).any()
        size = np.dtype(element).itemsize * (count or 1)
        offset = np.where(self.active, offset, 0)
        raw = ref.memory.view(np.uint8).reshape(-1)[offset[:, None] + np.arange(size)]
        values = np.ascontiguousarray(raw).view(element)
        return values[:, 0] if count is None else [np.ascontiguousarray(column) for column in values.T]

    def store(self, value, pointer, alignment=1):
        ref, offset = pointer
        offset = offset[self.active]
        assert not (offset % alignment).any()
        value = np.stack(value, axis=1) if isinstance(value, list) else value[:, None]
        raw = np.ascontiguousarray(value).view(np.uint8)[self.active]
        assert offset.size == 0 or 0 <= offset.min() <= offset.max() + raw.shape[1] <= ref.memory.nbytes
        ref.memory.view(np.uint8).reshape(-1)[offset[:, None] + np.arange(raw.shape[1])] = raw

    @staticmethod
    def prmt(a, b, selector):
        pool = np.stack([a, b], axis=1).view(np.uint8)
        picked = pool[:, [int(selector[0]) >> 4 * i & 7 for i in range(4)]]
        return np.ascontiguousarray(picked).view(np.uint32)[:, 0]

    @staticmethod
    def to_e4m3(elements):
        columns = [np.asarray(x, E4M3).view(np.uint8) for x in elements]
        return np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint32)[:, 0]

    def operand(self, tiles: np.ndarray) -> np.ndarray:
        """Registers in WGMMA_8BIT layout as the matrix they hold."""
        out = np.zeros((64 * tiles.shape[0], 16 * tiles.shape[1]), np.uint8)
        for (m, column, h), word in np.ndenumerate(tiles):
            for e in range(4):
                out[64 * m + 16 * self.w + 8 * h + self.g, 16 * column + 4 * self.q + e] = word >> 8 * e & 255
        return out.view(E4M3).astype(np.float32)

    def accumulator(self, matrix: np.ndarray):
        """A float32 matrix in WGMMA layout."""
        held = np.empty((matrix.shape[0] // 64, matrix.shape[1] // 8, 2), dtype=object)
        for m, column, h in np.ndindex(held.shape):
            row = 64 * m + 16 * self.w + 8 * h + self.g
            held[m, column, h] = [matrix[row, 8 * column + 2 * self.q + e] for e in range(2)]
        return types.SimpleNamespace(shape=matrix.shape, registers=held)
