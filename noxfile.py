"""What CI runs, and what a developer runs before sending a change: `nox`."""

import shutil
import time
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "package"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

CODE = ["ping_llm", "tests", "docs", "examples", "noxfile.py"]
GROUPS = nox.project.load_toml("pyproject.toml")["dependency-groups"]


@nox.session
def lint(session: nox.Session) -> None:
    """Checks format and lint."""
    session.install(*GROUPS["lint"])
    session.run("ruff", "format", "--check", *CODE)
    session.run("ruff", "check", *CODE)


@nox.session
def types(session: nox.Session) -> None:
    """Checks types."""
    session.install("-e", ".", *GROUPS["test"], *GROUPS["lint"])  # the extras' types, too
    session.run("pyright", "--pythonpath", str(Path(session.bin) / "python"))


@nox.session
def tests(session: nox.Session) -> None:
    """Runs all tests, also the slow ones; arguments go to pytest."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("pytest", *(session.posargs or ["-n", "2", "--durations", "15"]))


@nox.session
def package(session: nox.Session) -> None:
    """Builds sdist and wheel, installs the wheel in a fresh place and runs `quickstart` from it."""
    session.install("build")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", silent=True)
    (wheel,) = Path("dist").glob("*.whl")
    wheel = wheel.resolve()
    place = Path(session.create_tmp()).resolve()
    shutil.rmtree(place / "quickstart", ignore_errors=True)
    session.install("--force-reinstall", str(wheel))
    session.chdir(place)
    started = time.monotonic()
    session.run("ping-llm", "quickstart", "--output", "quickstart", "--json")
    session.log(f"quickstart took {time.monotonic() - started:.0f} s")


@nox.session
def docs(session: nox.Session) -> None:
    """Makes the reference pages that come from the code."""
    session.install("-e", ".")
    session.run("python", "docs/reference/generate.py")
