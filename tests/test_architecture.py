"""The house rules that a reader relies on, checked on the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package may import itself and what stands below it.
FLOORS = ("pallas_kernels", "fireq_jax", "checkpoints_convert")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path):
    """Absolute names of imported modules, those inside functions too."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(members & set(MODULES) or {node.module})
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor):
    """checkpoints_convert -> fireq_jax -> pallas_kernels, never back, not even inside a function."""
    above = FLOORS[FLOORS.index(floor) + 1 :]
    forbidden = (*above, "tests", "examples")
    for path in (path for path in FILES if path.relative_to(ROOT).parts[0] == floor):
        bad = [name for name in imported_modules(path) if name.split(".")[0] in forbidden]
        assert not bad, f"{path} imports {bad}"


def test_no_import_cycles():
    """Modules can be read one after the other, each after those it names, even those inside functions."""
    graph = {name: imported_modules(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert set(graph) == done, f"cycle among {sorted(set(graph) - done)}"


def test_only_jax_compat_looks_at_the_version():
    for path in FILES:
        looks = [
            node.lineno
            for node in ast.walk(tree_of(path))
            if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("jax.__version__", "jax.__version_info__"))
            or (isinstance(node, ast.Compare) and "version" in ast.unparse(node).lower() and "jax" in ast.unparse(node))
            or (isinstance(node, ast.ImportFrom) and node.module in ("jax.version", "importlib.metadata"))
        ]
        if path.name == "report.py":
            looks = [line for line in looks if '"jax": jax.__version__' not in path.read_text().splitlines()[line - 1]]
        assert path.name == "jax_compat.py" or not looks, f"{path}:{looks}"


def test_only_formats_rounds():
    """jnp.round and casts to E4M3 appear in formats.py and in the kernels, nowhere else."""
    rounding = {"jnp.round", "jnp.rint", "jnp.floor", "jnp.ceil", "jnp.trunc", "jax.lax.round", "lax.round"}
    for path in FILES:
        if path.name == "formats.py" or "sm90" in path.parts:
            continue
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            assert ast.unparse(node.func) not in rounding, f"{path}:{node.lineno} rounds"
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("astype", "view", "convert_element_type"):
                assert not any("e4m3" in ast.unparse(argument).lower() for argument in node.args), (
                    f"{path}:{node.lineno} casts to E4M3"
                )


def test_init_files_only_export():
    """A docstring, imports and ``__all__``."""
    for path in (path for path in FILES if path.name == "__init__.py"):
        for node in tree_of(path).body:
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert exports or docstring or isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}"


def test_files_and_functions_can_be_read_at_once():
    """No file is longer than 420 lines, and no function, its docstring included, longer than 60."""
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"
