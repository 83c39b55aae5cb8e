"""The house of docs/architecture.md, held to: who may import whom, and what."""

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import ping_llm

PACKAGE = Path(ping_llm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

# A part may import the parts of earlier levels, and itself; never one of its own level.
LEVELS = [
    {"text"},
    {"errors"},
    {"hashing", "progress", "resources", "packing", "addresses", "environment"},
    {"storage", "settings", "sharding", "columns"},
    {"measurements", "outputs", "places"},
    {"tokenizer", "models", "report"},
    {"activations", "estimators", "simulation"},
    {"data", "checkpoints"},
    {"runs"},
    {"ingest", "training", "extraction"},
    {"prediction", "inspection", "sae"},
    {"bench", "serve"},
    {"quickstart", "pretrained"},
    {"cli"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Parts that never load JAX, not even inside a function.
WITHOUT_JAX = {
    *("errors", "text", "hashing", "progress", "resources", "packing", "addresses", "storage"),
    "environment",
    *(
        "settings",
        "report",
        "columns",
        "measurements",
        "outputs",
        "places",
        "tokenizer",
        "estimators",
        "simulation",
    ),
    *("data", "ingest", "inspection"),
}


def _outside(parts: set[str]):
    return lambda path: path.parts[0].removesuffix(".py") not in parts


def SERVE(path: Path) -> bool:  # noqa: N802
    return path.parts[0] == "serve" or path == Path("cli/serve.py")


TORCH = {Path("extraction/parity.py"), Path("bench/peers.py")}
TENSORS = {Path("activations/reader.py"), Path("activations/torch_dataset.py")}

# Libraries that only some files may import.
RESERVED = {
    **dict.fromkeys(("uvicorn", "prometheus_client", "starlette", "pydantic"), SERVE),
    "fastapi": SERVE,
    "click": lambda path: path.parts[0] == "cli",
    "orbax": lambda path: path == Path("checkpoints.py"),
    "wandb": lambda path: path == Path("training/tracking.py"),
    "jax": _outside(WITHOUT_JAX),
    "flax": _outside(WITHOUT_JAX | {"activations"}),
    "optax": _outside(WITHOUT_JAX | {"activations"}),
    "torch": lambda path: path in TORCH | TENSORS,
    "transformers": lambda path: path in TORCH,
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Returns (module, is at the top of the file) for every import statement in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [(name, node in top) for name in names]
    return modules


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_part_has_its_place_in_the_house():
    assert {part_of(path) for path in FILES} - {"__init__", "__main__"} == set(LEVEL_OF)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    part = part_of(path)
    for module, at_top in imports(path):
        names = module.split(".")
        if names[0] != "ping_llm" or names[1] in {part, "__version__"}:
            continue
        if part in {"__init__", "__main__"}:
            assert not at_top or module == "ping_llm.cli.main", (
                f"{part} imports {module} at its top"
            )
            continue
        assert LEVEL_OF[names[1]] < LEVEL_OF[part], f"{part} may not import {module}"


def test_no_module_imports_itself_through_others():
    graph = {}
    for module, path in MODULES.items():
        graph[module] = set()
        for name, _ in imports(path):
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name not in ("", "ping_llm", module):
                graph[module].add(name)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_no_two_classes_share_a_name():
    names = collections.Counter(
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_reserved_libraries_stay_in_their_files(path):
    relative = path.relative_to(PACKAGE)
    for module, _ in imports(path):
        allowed = RESERVED.get(module.split(".")[0])
        assert allowed is None or allowed(relative), f"{relative} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_outputs_publishes(path):
    if part_of(path) in {"outputs", "storage"}:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            moves = node.func.attr == "rename" or ast.unparse(node.func) == "os.replace"
            assert not moves, f"{name_of(path)}:{node.lineno} moves a file; outputs.py publishes"


# Paths of the package's own, such as what its wheel carries or a directory it has just made.
OWN_PATHS = {"__file__", "temporary", "directory"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_a_user_names_is_a_location(path):
    if part_of(path) in {"outputs", "storage"}:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            wraps = node.func.id == "Path" and ast.unparse(node.args[0]) not in OWN_PATHS
            assert not wraps, f"{name_of(path)}:{node.lineno} wraps a name in Path; use a Location"


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) == "cli"], ids=name_of)
def test_the_top_of_the_cli_imports_only_what_is_light(path):
    for module, at_top in imports(path):
        name = module.split(".")[0]
        light = name == "click" or name in sys.stdlib_module_names
        light_parts = ("ping_llm.cli", "ping_llm.errors", "ping_llm.environment", "ping_llm.text")
        own = module.startswith((*light_parts, "ping_llm.__version__"))
        own = own or (module.startswith("ping_llm.") and ".settings" in module)
        assert not at_top or light or own, f"{path.name} imports {module} at its top"


def loaded_by(code: str, libraries: set[str]) -> set[str]:
    """Returns which of `libraries` a fresh process has loaded after `code`."""
    program = f"import sys\n{code}\nprint(*({libraries!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"jax", "numpy", "pyarrow", "flax", "matplotlib", "rich", "duckdb", "tensorstore"}


def test_help_imports_nothing_heavy():
    code = "from ping_llm.cli import cli\ncli.main(['--help'], standalone_mode=False)"
    assert loaded_by(code, HEAVY) == set()


def test_the_help_of_every_command_imports_nothing_heavy():
    code = (
        "from ping_llm.cli import COMMANDS, cli\n"
        "for name in COMMANDS: cli.main([name, '--help'], standalone_mode=False)"
    )
    assert loaded_by(code, HEAVY) == set()


def test_reading_a_store_loads_no_jax():
    libraries = {"jax", "flax", "optax", "orbax", "grain", "matplotlib"}
    assert loaded_by("import ping_llm.activations.reader", libraries) == set()
    assert loaded_by("from ping_llm import ActivationReader", libraries) == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_begins_with_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
