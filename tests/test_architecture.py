"""The structure of the source: no import cycles, no imports of benchmarks or tests, one stem per operation.

Imports are read from the source, not executed. Imports inside functions must not close a cycle either: they exist to
save time at start-up. Two things are allowed: imports under ``if TYPE_CHECKING``, and the table of names in
``atom_fast/__init__.py``, which imports a module when one of its names is first used.
"""

import ast
import functools
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "atom_fast"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
HELPERS = {"powers", "probe"}  # kernels that belong to no operator
# Of measured kernels, see `KERNELS` in ops/launching.py.
SUCCESSORS = {"attention_sums", "folded_conv_block", "norm"}
OPERATORS_WITHOUT_KERNEL = {"dispatch", "joint_batch", "launching", "native", "operators"}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(tree, functions=True):
    """Yield the import statements that are executed, with or without those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not is_type_checking(node) and (functions or not isinstance(node, ast.FunctionDef)):
            yield from import_nodes(node, functions)


@functools.cache
def imports_of(module, functions=True):
    """List the absolute names that a module imports; what ``from P import a`` names is ``P.a`` if that is a module."""
    path, names = FILES[module], []
    for node in import_nodes(ast.parse(path.read_text("utf-8")), functions):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            members = [f"{base}.{alias.name}" for alias in node.names]
            names += [member if member in FILES else base for member in members]
    return names


def packages_of(name):
    """List the packages that a module lies in; importing the module runs their code first."""
    return [name.rsplit(".", level)[0] for level in range(1, name.count(".") + 1)]


def import_graph(functions=True):
    """Map every module of the package to the modules whose code its imports run."""
    graph = {}
    for module in FILES:
        named = set(imports_of(module, functions))
        implied = {package for name in named for package in packages_of(name)} - {module, *packages_of(module)}
        graph[module] = (named | implied) & FILES.keys()
    return graph


def folder_of(module):
    """Name the folder of a module; a module at the top of the package stands for itself."""
    return ".".join(module.split(".")[:2])


def find_cycle(graph):
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))  # the sorter's edges point from a module to what imports it
    return None


def test_modules_import_one_another_without_a_cycle():
    for functions in (False, True):
        assert find_cycle(import_graph(functions)) is None


def test_folders_import_one_another_without_a_cycle():
    for functions in (False, True):
        folders = {folder_of(module): set() for module in FILES}
        for module, imports in import_graph(functions).items():
            folders[folder_of(module)] |= {folder_of(name) for name in imports} - {folder_of(module)}
        assert find_cycle(folders) is None


def test_the_package_imports_neither_benchmarks_nor_tests_nor_examples():
    outside = {"benchmarks", "tests", "examples", "kernels", "setup"}
    for module in FILES:
        assert not outside & {name.split(".")[0] for name in imports_of(module)}, module


def test_benchmarks_have_one_door():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        named = {alias.name for node in import_nodes(tree) if isinstance(node, ast.Import) for alias in node.names}
        reads_arguments = {"argparse", "click"} & named or "__main__" in path.read_text("utf-8")
        assert path.name == "__main__.py" or not reads_arguments, path


def test_kernels_operators_and_tests_of_an_operation_have_one_stem():
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"} - HELPERS - SUCCESSORS
    operators = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - {"__init__"} - OPERATORS_WITHOUT_KERNEL
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert kernels == operators
    assert operators <= tests <= operators | OPERATORS_WITHOUT_KERNEL
    assert {path.stem for path in (ROOT / "kernels").glob("*.c")} <= kernels
