"""The rules of the house, which CONTRIBUTING.md states: sizes, imports and names of the two packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("drs_lib", "drs_course")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LONGEST = {ast.FunctionDef: 60, ast.ClassDef: 200}
# Without these everything but what they are for works; the compiled forms need numba and Triton.
OPTIONAL = {"pydensecrf", "numba", "triton", "joblib", "dask", "distributed", "dask_jobqueue"}
OPTIONAL |= {"drs_lib.kernels.cpu", "drs_lib.kernels.cuda"}
# A module of the library imports from those on the lines above its own, and from its own line.
ORDER = """
drs_lib.files drs_lib.arguments
drs_lib.data drs_lib.crf
drs_lib.recipes
drs_lib.runtime
drs_lib.kernels drs_lib.drs
drs_lib.plug
drs_lib.networks drs_lib.weights
drs_lib.maps drs_lib.labels drs_lib.losses drs_lib.metrics
drs_lib.archives drs_lib.batches
drs_lib.train
drs_lib.method
drs_lib drs_lib.__main__
"""
every_module = pytest.mark.parametrize("module", MODULES)


def imported(module):
    """(name, node, whether inside of a function) of everything that a module imports."""
    inside = {
        node
        for function in ast.walk(TREES[module])
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports say the whole name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module, node, node in inside


@every_module
def test_a_function_fits_on_a_screen_and_a_class_on_three(module):
    for node in ast.walk(TREES[module]):
        if type(node) in LONGEST:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST[type(node)], f"{node.name} has {lines} lines"


@every_module
def test_imports_stand_at_the_top(module):
    for name, node, inside in imported(module):
        optional = {name, name.partition(".")[0]} & OPTIONAL
        assert not inside or optional, f"line {node.lineno} imports {name}"
    for node in TREES[module].body:
        if isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__"):
            assert isinstance(node.body[0], ast.Raise), "a module's names are assigned in it"


@every_module
def test_names_are_written_out_and_private_ones_stay_at_home(module):
    known = set()  # other modules, by their names here
    for name, node, _ in imported(module):
        if name.startswith("drs_"):
            known |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("drs_"):
            private = [alias.name for alias in node.names if alias.name[0] == "_" != alias.name[1]]
            assert not private, f"line {node.lineno} imports {private}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert node.attr[0] != "_" or node.attr.startswith("__"), f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            built = isinstance(node.args[1], ast.JoinedStr | ast.BinOp)
            assert not built, f"line {node.lineno} builds a name from a string"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("drs_lib")])
def test_the_library_imports_downwards_and_never_the_course(module):
    ranks = {name: rank for rank, row in enumerate(ORDER.split("\n")) for name in row.split()}

    def rank(name):
        while name not in ranks:
            name = name.rpartition(".")[0]
        return ranks[name]

    for name, node, _ in imported(module):
        assert not name.startswith("drs_course")
        if name.startswith("drs_lib") and name != "drs_lib":
            assert rank(name) <= rank(module), f"line {node.lineno} imports {name}"
