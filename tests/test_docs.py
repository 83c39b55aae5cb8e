"""The documents are true: generated pages, links, and the commands they show."""

import json
import re
import shlex
from pathlib import Path

import generate
import pytest
from click.testing import CliRunner

from ping_llm.cli import COMMANDS, cli
from ping_llm.simulation.simulate import simulate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Sizes that a document shows, made small enough to run here.
SMALLER = {
    "--steps": "2",
    "--measurements": "3000",
    "--probes": "20",
    "--days": "2",
    "--max-rows": "5",
}


def commands_of(page: Path) -> list[list[str]]:
    """Returns the `$ ping-llm ...` lines of a page, with sizes made small."""
    found = []
    for block in CONSOLE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ ping-llm "):
                words = shlex.split(line)[2:]
                for flag, value in SMALLER.items():
                    if flag in words:
                        words[words.index(flag) + 1] = value
                found.append(words)
    return found


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_generated_pages_are_what_the_code_says_now(name):
    page = ROOT / "docs" / "reference" / name
    assert page.read_text() == generate.PAGES[name](), "run `nox -s docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if commands_of(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path, monkeypatch):
    """The reader has `pings.parquet`, or simulates it; what a command made stays."""
    monkeypatch.chdir(tmp_path)
    commands = commands_of(page)
    if not any(words[0] == "simulate" for words in commands):
        simulate(Path("pings.parquet"), probes=20, days=2.0, measurements=3000, seed=1)
    for words in commands:
        small = ["--set", "eval_every=2"] if words[0] == "train" else []
        result = CliRunner().invoke(cli, [*words, *small])
        assert result.exit_code == 0, f"ping-llm {shlex.join(words)}\n{result.output}"
        if "--json" in words:
            json.loads(result.stdout)


def test_every_command_is_shown_somewhere():
    text = "\n".join(page.read_text() for page in PAGES)
    for name in COMMANDS:
        assert f"ping-llm {name}" in text


def test_the_readme_gives_ci_its_command():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- tests -->\n```sh\n(.*?)```", text, re.DOTALL)
    assert block, "README.md marks its test command with <!-- tests -->"
    assert "nox" in block[1]
