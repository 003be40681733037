"""Kernels as they are lowered for CUDA, run in numpy: all threads of all blocks at once, on any machine.

For kernels without shared memory, whose threads load, compute, exchange numbers within their warps and store. What runs
is the kernel's MLIR with the PTX inlined in it, so addresses, predicates, shuffles and roundings are the device's own.
Only its approximations (reciprocals, roots) are rounded to nearest here. An access outside of all operands or one that
is not aligned is an error, and so is a shuffle in which a part of a warp takes part.
"""

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import ml_dtypes
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from pallas_kernels import jax_compat

can_simulate = pytest.mark.skipif(
    (0, 11) <= jax_compat.JAX_VERSION < (0, 12), reason="jaxlib 0.11 cannot read the kernels that it writes"
)
WARP = 32
_ALIGNMENT = 256  # of an operand, and at least as many bytes between two
_DTYPES = {"i1": bool, "i8": np.uint8, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64, "index": np.uint64}
_DTYPES |= {"ui8": np.uint8, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f8E4M3FN": ml_dtypes.float8_e4m3fn}


def simulated(function: Callable[..., Any], *operands: Any) -> Any:
    """``function`` of the operands, which is a call of one Mosaic GPU kernel and nothing else."""
    exported = jax.export.export(jax.jit(function), platforms=["cuda"])(*operands)
    with mlir.make_ir_context() as context, np.errstate(all="ignore"):
        context.allow_unregistered_dialects = True
        program = ir.Module.parse(exported.mlir_module())
        functions = {x.name.value: x for x in program.body}
        results = _call(functions, "main", [np.asarray(x) for x in jax.tree.leaves(operands)])
    return jax.tree.unflatten(exported.out_tree, results)


def _call(functions: dict[str, Any], name: str, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A function of the program around the kernel."""
    [block] = functions[name].regions[0]
    values = dict(zip(block.arguments, arguments, strict=True))
    for op in block:
        inputs, kind = [values[x] for x in op.operands], op.operation.name
        if kind == "func.return":
            return inputs
        if kind == "func.call":
            outputs = _call(functions, op.attributes["callee"].value, inputs)
        elif kind == "stablehlo.constant":
            outputs = [np.array(op.attributes["value"])]
        else:
            assert "mosaic_gpu" in op.attributes["call_target_name"].value, op
            outputs = _launch(op, inputs)
        values |= zip(op.results, outputs, strict=True)
    raise AssertionError("a function does not return")


def _launch(op: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The kernel of a custom call; a result that aliases an operand is what the kernel leaves in that."""
    pairs = re.findall(
        r"tuple_indices = \[(\d*)\], operand_index = (\d+)", str(op.attributes["output_operand_aliases"])
    )
    aliased = {int(result or 0): int(operand) for result, operand in pairs}
    types = [ir.RankedTensorType(x.type) for x in op.results]
    memory = _Memory([*inputs, *(np.empty(x.shape, _DTYPES[str(x.element_type)]) for x in types)])
    for i in range(len(types)):
        memory.poison(len(inputs) + i)
    places = [aliased.get(i, len(inputs) + i) for i in range(len(types))]
    code = ir.Module.parse(op.attributes["mhlo.backend_config"]["module"].value_bytes)
    _Kernel(memory, [memory.starts[i] for i in (*range(len(inputs)), *places)]).host(code)
    return [memory.array(i) for i in places]


class _Memory:
    """The operands, one after the other in one address space."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.like, self.starts, end = arrays, [], _ALIGNMENT
        for x in arrays:
            self.starts.append(end)
            end += (x.nbytes // _ALIGNMENT + 2) * _ALIGNMENT
        self.bytes, self.valid = np.zeros(end, np.uint8), np.zeros(end, bool)
        for start, x in zip(self.starts, arrays, strict=True):
            self.bytes[start : start + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            self.valid[start : start + x.nbytes] = True

    def array(self, i: int) -> np.ndarray:
        like = self.like[i]
        return self.bytes[self.starts[i] : self.starts[i] + like.nbytes].view(like.dtype).reshape(like.shape)

    def poison(self, i: int) -> None:
        """Numbers that are none, or codes that nothing is."""
        self.bytes[self.starts[i] : self.starts[i] + self.like[i].nbytes] = 0xFF

    def _at(self, address: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        address = np.broadcast_to(address, active.shape)[active].astype(np.int64)
        assert not (address % size).any(), "an access is not aligned"
        index = address[:, None] + np.arange(size)
        assert ((index >= 0) & (index < self.valid.size)).all()
        assert self.valid[index].all(), "an access outside of all operands"
        return index

    def load(self, address: np.ndarray, words: int, active: np.ndarray) -> list[np.ndarray]:
        out = np.zeros((active.size, words), np.uint32)
        out[active] = self.bytes[self._at(address, 4 * words, active)].view(np.uint32)
        return list(out.T)

    def store(self, address: np.ndarray, words: Sequence[np.ndarray], active: np.ndarray) -> None:
        rows = np.stack([np.broadcast_to(x, active.shape) for x in words], axis=1)[active]
        index = self._at(address, rows.itemsize * len(words), active)
        self.bytes[index] = np.ascontiguousarray(rows).view(np.uint8)


class _Kernel:
    """Runs operations; a value is an array with one entry a thread, or with one for all."""

    def __init__(self, memory: _Memory, pointers: Sequence[int]) -> None:
        self.memory, self.pointers = memory, pointers
        self.values: dict[Any, Any] = {}
        self.active = np.ones(1, bool)

    def host(self, module: ir.Module) -> None:
        """The function that launches; its second argument points to the operands' addresses."""
        [function] = [x for x in module.body if x.operation.name.endswith("func.func") and len(x.regions[0].blocks)]
        self.region(function.regions[0], None, 0)

    def region(self, region: Any, *arguments: Any) -> list[Any]:
        """What it yields."""
        [block] = region
        self.values |= zip(block.arguments, arguments, strict=True)
        for op in block:
            name = op.operation.name.removeprefix("stable_mosaic_gpu.")
            inputs = [self.values[x] for x in op.operands]
            if name in ("scf.yield", "func.return", "gpu.terminator"):
                return inputs
            method = getattr(self, name.replace(".", "_"), None)
            outputs = method(op, *inputs) if method else _arithmetic(name, op, inputs)
            results = list(op.results)
            self.values |= zip(results, outputs if len(results) > 1 else [outputs], strict=False)
        return []

    # --- host: the operands' addresses, and the launch ----------------------------------------------------

    def llvm_getelementptr(self, op: Any, _: Any) -> int:
        (index,) = ir.DenseI32ArrayAttr(op.attributes["rawConstantIndices"])
        return index

    def llvm_load(self, _: Any, index: int) -> np.ndarray:
        return np.full(1, self.pointers[index], np.uint64)

    def gpu_launch(self, op: Any, _: Any, *sizes: Any) -> None:
        *grid_and_block, _ = (int(x[0]) for x in sizes)
        self.blocks, self.threads = grid_and_block[:3], grid_and_block[3:]
        assert self.blocks[1:] == [1, 1]
        assert self.threads[1:] == [1, 1]
        self.block, self.thread = (x.reshape(-1) for x in np.indices((self.blocks[0], self.threads[0]), np.uint64))
        self.active = np.ones(self.thread.size, bool)
        self.region(op.regions[0], *[None] * 12)

    def _dimension(self, op: Any, x: np.ndarray) -> np.ndarray:
        return x if str(op.attributes["dimension"]).endswith("x>") else np.zeros(1, np.uint64)

    def gpu_thread_id(self, op: Any) -> np.ndarray:
        return self._dimension(op, self.thread)

    def gpu_block_id(self, op: Any) -> np.ndarray:
        return self._dimension(op, self.block)

    def gpu_block_dim(self, op: Any) -> np.ndarray:
        return np.full(1, self.threads["xyz".index(str(op.attributes["dimension"])[-2])], np.uint64)

    def nvvm_elect_sync(self, _: Any) -> np.ndarray:
        return self.thread % WARP == 0

    def scf_index_switch(self, *_: Any) -> None:
        """What is done once a block's work is: nothing."""

    # --- device: control flow, warps, inlined PTX ---------------------------------------------------------

    def scf_if(self, op: Any, condition: np.ndarray) -> Any:
        outer, branches = self.active, []
        for region, chosen in zip(op.regions, (condition, ~condition), strict=True):
            self.active = outer & chosen
            branches.append(self.region(region) if len(region.blocks) and self.active.any() else None)
        self.active = outer
        results = []
        for i in range(len(op.results)):
            then, otherwise = (branch[i] if branch else None for branch in branches)
            results.append(
                then if otherwise is None else otherwise if then is None else np.where(condition, then, otherwise)
            )
        return results if len(results) != 1 else results[0]

    def scf_for(self, op: Any, start: np.ndarray, end: np.ndarray, step: np.ndarray, *carry: Any) -> Any:
        outer, index = self.active, start
        while (inside := outer & (index < end)).any():
            self.active = inside
            following = self.region(op.regions[0], index, *carry)
            carry = tuple(np.where(inside, x, y) for x, y in zip(following, carry, strict=True))
            index = index + step
        self.active = outer
        return carry if len(carry) != 1 else carry[0]

    def nvvm_shfl_sync(self, op: Any, _: Any, x: np.ndarray, distance: np.ndarray, __: Any) -> np.ndarray:
        warps = self.active.reshape(-1, WARP)
        assert (warps == warps[:, :1]).all(), "a part of a warp shuffles"
        lane = np.arange(self.active.size) % WARP
        kind = str(op.attributes["kind"])
        assert "bfly" in kind or "idx" in kind, kind
        source = lane ^ int(distance[0]) if "bfly" in kind else np.full_like(lane, int(distance[0]))
        return np.broadcast_to(x, self.active.shape)[np.arange(self.active.size) - lane + source]

    def llvm_inline_asm(self, op: Any, *inputs: np.ndarray) -> Any:
        constraints = op.attributes["constraints"].value.split(",")
        outputs = [x[1:] for x in constraints if x.startswith("=")]
        registers = {f"${len(outputs) + i}": x for i, x in enumerate(inputs)}
        code = op.attributes["asm_string"].value.strip().removeprefix("{").removesuffix("}")
        for statement in filter(None, map(str.strip, code.split(";"))):
            self._instruction(statement, registers)
        results = [registers[f"${i}"].view({"f": np.float32, "r": np.uint32}[x]) for i, x in enumerate(outputs)]
        return results[0] if len(results) == 1 else results

    def _instruction(self, statement: str, registers: dict[str, Any]) -> None:
        active = self.active
        if statement.startswith("@"):
            predicate, statement = statement[1:].split(maxsplit=1)
            active = active & registers[predicate]
        name, _, rest = statement.partition(" ")
        if name == ".reg" or name.startswith("fence"):
            return
        named = re.findall(r"\$\d+|0f[0-9A-F]{8}|[a-z]\w*|\d+", rest)
        if name.startswith("ld.global"):
            *targets, address, offset = named
            loaded = self.memory.load(registers[address] + np.uint64(offset), len(targets), active)
            registers |= zip(targets, loaded, strict=True)
        elif name.startswith("st.global"):
            address, *sources = named
            self.memory.store(registers[address], [registers[x] for x in sources], active)
        elif name == "mov.b32" and rest.startswith("{"):
            word = np.ascontiguousarray(registers[named[2]]).view(np.uint32)
            registers |= {named[0]: (word & 0xFFFF).astype(np.uint16), named[1]: (word >> 16).astype(np.uint16)}
        elif name == "mov.b32" and "{" in rest:
            low, high = (registers[x].astype(np.uint32) for x in named[1:])
            registers[named[0]] = low | high << np.uint32(16)
        else:
            inputs = [registers[x] if x in registers else _literal(x) for x in named[1:]]
            registers[named[0]] = _PTX[name](*inputs)


def _literal(x: str) -> np.ndarray:
    return (
        np.array([int(x[2:], 16)], np.uint32).view(np.float32) if x.startswith("0f") else np.full(1, int(x), np.uint16)
    )


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The product of two float32 is exact in float64."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = [x >> np.uint32(8 * i) & np.uint32(255) for x in (a, b) for i in range(4)]
    picked = [pool[int(selector[0]) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
    return functools.reduce(operator.or_, picked)


def _e4m3x2(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    # NaN passes through the bounds.
    codes = [
        np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint16) for x in (low, high)
    ]
    return codes[0] | codes[1] << np.uint16(8)


def _bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


def _saturated(x: np.ndarray) -> np.ndarray:
    """To 0..1; NaN to 0."""
    return np.fmin(np.fmax(x, np.float32(0)), np.float32(1))


_PTX: dict[str, Callable[..., np.ndarray]] = {
    "setp.ne.b32": lambda x, y: x != y,
    "mov.b16": lambda x: x,
    "abs.f32": np.abs,
    "max.f32": np.fmax,
    "min.f32": np.fmin,
    "fma.rn.f32": _fma,
    "mul.rn.sat.f32": lambda x, y: _saturated(x * y),
    "rcp.rn.f32": lambda x: np.float32(1) / x,
    "rcp.approx.ftz.f32": lambda x: np.float32(1) / x,
    "rsqrt.approx.f32": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "cvt.rn.satfinite.e4m3x2.f32": _e4m3x2,
    "cvt.rn.bf16.f32": _bf16,
    "cvt.rn.bf16x2.f32": lambda high, low: _bf16(low) | _bf16(high).astype(np.uint32) << np.uint32(16),
    "prmt.b32": _prmt,
}


def _signed(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda x, y: compare(x.view(np.dtype(f"i{x.itemsize}")), y.view(np.dtype(f"i{y.itemsize}")))


# By the numbers of arith's predicates.
_INTEGERS = [np.equal, np.not_equal, *map(_signed, (np.less, np.less_equal, np.greater, np.greater_equal))]
_INTEGERS += [np.less, np.less_equal, np.greater, np.greater_equal]
_FLOATS = {1: np.equal, 2: np.greater, 3: np.greater_equal, 4: np.less, 5: np.less_equal}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "divu": np.floor_divide, "remu": np.remainder,
    "rems": _signed(np.remainder), "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shru": np.right_shift, "minu": np.minimum, "maxu": np.maximum, "div": np.divide,
    "neg": np.negative, "maxnum": np.fmax, "minnum": np.fmin,
}  # fmt: skip


def _arithmetic(name: str, op: Any, inputs: Sequence[Any]) -> Any:
    """An operation that is the same for every thread."""
    dialect, _, kind = name.partition(".")
    if kind in ("constant", "mlir.constant"):
        value, dtype = op.attributes["value"], _DTYPES[str(op.results[0].type)]
        return np.array([value.value]).astype(dtype)
    if kind in ("extui", "trunci", "index_cast"):
        return inputs[0].astype(_DTYPES[str(op.results[0].type)])
    if kind == "bitcast":
        return inputs[0].view(_DTYPES[str(op.results[0].type)])
    if kind in ("ptrtoint", "inttoptr", "unrealized_conversion_cast"):
        return inputs[0]
    if kind == "select":
        return np.where(*inputs)
    if kind in ("cmpi", "cmpf"):
        return (_INTEGERS if kind == "cmpi" else _FLOATS)[op.attributes["predicate"].value](*inputs)
    if kind in ("intr.fma", "fma"):
        return _fma(*inputs)
    if kind == "mlir.undef":
        return {}
    if kind in ("insertvalue", "extractvalue"):
        position = tuple(ir.DenseI64ArrayAttr(op.attributes["position"]))
        if kind == "insertvalue":
            return {**inputs[0], position: inputs[1]}
        return inputs[0][position] if isinstance(inputs[0], dict) else inputs[0][position[0]]
    if dialect in ("arith", "llvm") and (function := _ELEMENTWISE.get(kind) or _ELEMENTWISE.get(kind[:-1])):
        return function(*inputs)
    if kind in ("barrier", "dynamic_shared_memory", "view", "fence.mbarrier.init"):
        return None
    raise NotImplementedError(name)
