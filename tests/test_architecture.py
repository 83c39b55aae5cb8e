"""The house of docs/architecture.md, held to: who may import whom, and what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ping_llm

PACKAGE = Path(ping_llm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts of earlier levels, and itself; never one of its own level.
LEVELS = [
    {"errors"},
    {"storage", "progress", "report", "tokenizer", "packing", "sharding"},
    {"data", "models"},
    {"checkpoints"},
    {"training", "prediction", "extraction"},
    {"benchmarks", "quickstart"},
    {"cli"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Libraries that only some files may import.
RESERVED = {
    "click": lambda path: path.parts[0] == "cli",
    "orbax": lambda path: path == Path("checkpoints.py"),
    "wandb": lambda path: path == Path("training/tracking.py"),
    "jax": lambda path: path.parts[0] not in {"data", "tokenizer.py", "packing.py"},
    "flax": lambda path: path.parts[0] not in {"data", "tokenizer.py", "packing.py"},
    "grain": lambda path: path == Path("data/pipeline.py"),
    "torch": lambda path: path in {Path("extraction/parity.py"), Path("training/yardsticks.py")},
    "transformers": lambda path: path == Path("extraction/parity.py"),
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Returns (module, is at the top of the file) for every import statement in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, node in top) for name in names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_its_place_in_the_house():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts <= set(LEVEL_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    for module, _ in imports(path):
        names = module.split(".")
        if names[0] != "ping_llm" or names[1] in {part, "__version__"}:
            continue
        assert part != "__init__", "the package's __init__ imports nothing of its own"
        assert LEVEL_OF[names[1]] < LEVEL_OF[part], f"{part} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_reserved_libraries_stay_in_their_files(path):
    relative = path.relative_to(PACKAGE)
    for module, _ in imports(path):
        allowed = RESERVED.get(module.split(".")[0])
        assert allowed is None or allowed(relative), f"{relative} may not import {module}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(p) == "cli"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_top_of_the_cli_imports_only_click_and_the_standard_library(path):
    for module, at_top in imports(path):
        name = module.split(".")[0]
        light = name == "click" or name in sys.stdlib_module_names
        own = module.startswith(("ping_llm.cli", "ping_llm.errors", "ping_llm.__version__"))
        assert not at_top or light or own, f"{path.name} imports {module} at its top"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from ping_llm.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'jax', 'numpy', 'pyarrow', 'flax', 'matplotlib', 'rich', 'duckdb'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_begins_with_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
