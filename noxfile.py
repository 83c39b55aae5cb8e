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
def sae_lens(session: nox.Session) -> None:
    """Compares our sparse autoencoders with what SAELens makes of their files, and back."""
    torch = next(each for each in GROUPS["test"] if each.startswith("torch"))
    session.install("-e", ".", "sae-lens", torch, "hypothesis", "pytest")
    session.run("pytest", "tests/sae/test_sae_lens.py")


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
def bench(session: nox.Session) -> None:
    """Measures what docs/benchmarks.md records; to be run on a quiet machine."""
    session.install("-e", ".[parity]")
    place = Path(session.create_tmp()).resolve()
    pings, rows, run, model = (place / name for name in ("pings.parquet", "rows", "run", "qwen2"))

    def ping_llm(*words: object) -> None:
        session.run("ping-llm", *map(str, words), "--json")

    ping_llm("simulate", "--output", pings, "--measurements", 2_000_000, "--probes", 500)
    ping_llm("bench", "prepare", pings)
    ping_llm("prepare-data", pings, "--output", rows)
    ping_llm("bench", "loader", "--data", rows)
    ping_llm("bench", "train", "--compare")
    ping_llm("train", "--data", rows, "--output", run, "--steps", 20)
    ping_llm("bench", "predict", "--run", run)
    # Random weights in the shape of Qwen2.5-0.5B.
    code = (
        "from pathlib import Path; from hf_checkpoints import make_checkpoint; "
        f"make_checkpoint(Path({str(model)!r}), hidden_size=896, intermediate_size=4864, "
        "num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, "
        "max_position_embeddings=32768, tie_word_embeddings=True)"
    )
    if not model.exists():
        session.run("python", "-c", code, env={"PYTHONPATH": "tests"})
    ping_llm("bench", "extract", "--model", model, "--layers", "3,7,11,15,19,23", "--compare")


@nox.session
def pretrain(session: nox.Session) -> None:
    """Makes the model in the box from a directory of files: `nox -s pretrain -- DATA`."""
    if not session.posargs:
        session.error("give the directory of the files: nox -s pretrain -- DATA")
    session.install("-e", ".")
    data, *words = session.posargs
    place = Path(session.create_tmp()).resolve() / "pretrained"
    recipe = ("python", "-m", "ping_llm.pretrained.recipe")
    session.run(*recipe, str(Path(data).resolve()), str(place), *words)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(place / "pretrained" / name, Path("ping_llm", "pretrained", name))


@nox.session
def docs(session: nox.Session) -> None:
    """Makes the reference pages that come from the code."""
    session.install("-e", ".")
    session.run("python", "docs/reference/generate.py")
