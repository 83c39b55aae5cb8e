"""What the command line sets before JAX starts, and what it leaves to the user."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from ping_llm import environment
from ping_llm.errors import ConfigError

OURS = ("PING_LLM_", "JAX_", "MALLOC_", "GLIBC_TUNABLES", "XDG_CACHE_HOME", "PYTHONWARNINGS")
# Two programs: what they give, how many came from the cache, and what holds.
PROGRAM = """
import json
from ping_llm import environment
environment.prepare()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
double, half = jax.jit(lambda x: x * 2), jax.jit(lambda x: x / 2)
print(json.dumps({
    "result": float(double(half(42.0))),
    "hits": hits.count("/jax/compilation_cache/cache_hits"),
    "misses": hits.count("/jax/compilation_cache/cache_misses"),
    **environment.in_force(),
}))
"""


def start(home: Path, **variables: str) -> dict:
    """Returns what `PROGRAM` prints in a fresh process whose home is `home`, without a sound."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    env = {**clean, "HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def entries(home: Path) -> list[Path]:
    return sorted((home / ".cache/ping-llm/compiled").glob("*/*-cache"))


@pytest.fixture
def no_variables(monkeypatch, tmp_path):
    """An environment without any variable that counts here; afterwards, all as it was."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ["HOME"] = str(tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeGlibc())
    monkeypatch.setattr(FakeGlibc, "settings", {})
    monkeypatch.setattr(environment.atexit, "register", lambda *args: None)
    monkeypatch.setattr(environment.warnings, "filterwarnings", lambda *args, **kwargs: None)
    monkeypatch.setattr(environment.warnings, "showwarning", print)
    monkeypatch.setattr(environment, "_memory_kept", False)
    yield
    os.environ.clear()
    os.environ.update(before)


class FakeGlibc:
    settings: ClassVar[dict[int, int]] = {}
    gnu_get_libc_version = None

    def mallopt(self, number, value):
        self.settings[number] = value
        return 1


def test_a_second_start_compiles_nothing(tmp_path):
    first = start(tmp_path)
    written = entries(tmp_path)
    second = start(tmp_path)
    assert (first["result"], first["hits"]) == (42.0, 0)
    assert first["misses"] == len(written) == 2
    assert (second["result"], second["hits"], second["misses"]) == (42.0, len(written), 0)
    assert entries(tmp_path) == written


def test_damaged_programs_are_compiled_and_stored_again(tmp_path):
    start(tmp_path)
    cut, flipped = entries(tmp_path)[:2]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    middle = bytearray(flipped.read_bytes())
    middle[len(middle) // 2] ^= 0xFF
    flipped.write_bytes(middle)
    damaged, healed = start(tmp_path, PYTHONWARNINGS="error"), start(tmp_path)
    assert (damaged["result"], damaged["misses"]) == (42.0, 2)
    assert (healed["result"], healed["misses"]) == (42.0, 0)


def test_a_home_that_cannot_be_written_is_no_matter(tmp_path):
    home = tmp_path / "file"
    home.write_text("")
    assert start(home)["result"] == 42.0
    assert start(Path("relative"))["compilation_cache"] is None


def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path):
    start(tmp_path)
    for path in entries(tmp_path):
        path.unlink()
        path.mkdir()  # reading and writing fail, for root as well
    assert start(tmp_path)["result"] == 42.0


def test_the_users_cache_stays_the_users(tmp_path):
    report = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert report["compilation_cache"] == str(tmp_path / "mine")
    assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in report["variables"]
    assert not (tmp_path / ".cache").exists()


def test_both_are_off_where_the_user_says_so(tmp_path):
    report = start(tmp_path, PING_LLM_COMPILATION_CACHE="off", PING_LLM_KEEP_MEMORY="off")
    assert (report["compilation_cache"], report["memory_kept"]) == (None, False)
    assert not (tmp_path / ".cache").exists()


def test_another_word_than_on_and_off_is_refused(no_variables, monkeypatch):
    monkeypatch.setenv("PING_LLM_KEEP_MEMORY", "no")
    with pytest.raises(ConfigError, match="PING_LLM_KEEP_MEMORY is 'no'; set it to on or off"):
        environment.prepare()


def test_the_command_line_says_so_in_one_line():
    code = "from ping_llm.cli import main; main()"
    env = {**os.environ, "PING_LLM_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: PING_LLM_COMPILATION_CACHE is '0'; set it to on or off\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_glibc_takes_every_setting(tmp_path):
    assert start(tmp_path)["memory_kept"] is True


@pytest.mark.parametrize(
    "variable",
    [
        {"MALLOC_ARENA_MAX": "4"},
        {"MALLOC_TOP_PAD_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=9"},
    ],
)
def test_the_users_allocator_stays_the_users(no_variables, monkeypatch, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    environment.prepare()
    assert FakeGlibc.settings == {}
    assert environment.in_force()["memory_kept"] is False
    assert environment.in_force()["variables"].items() >= variable.items()


def test_other_tunables_are_no_reason_to_leave_the_allocator_alone(no_variables, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    environment.prepare()
    assert FakeGlibc.settings[-8] == 1  # M_ARENA_MAX


def test_another_c_library_is_left_alone(no_variables, monkeypatch):
    monkeypatch.delattr(FakeGlibc, "gnu_get_libc_version")
    environment.prepare()
    assert FakeGlibc.settings == {}


def test_the_library_sets_nothing():
    code = (
        "import os; before = dict(os.environ)\n"
        "import ctypes; ctypes.CDLL = None\n"  # whoever asks for the C library fails
        "import ping_llm, ping_llm.cli, ping_llm.environment\n"
        "assert dict(os.environ) == before and not ping_llm.environment._memory_kept"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_programs_of_other_cpus_and_core_counts_stay_apart(no_variables, monkeypatch):
    here = environment._cpu()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(999))
    assert environment._cpu().split("-")[0] == here.split("-")[0]
    assert environment._cpu() != here


def test_a_cache_of_another_user_is_not_read(no_variables, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat("/proc/self").st_uid + 1)
    environment.prepare()
    assert environment.in_force()["compilation_cache"] is None


def test_the_cache_stays_within_its_bound(monkeypatch, tmp_path):
    for age, name in enumerate(["newest", "newer", "older", "oldest"]):
        path = tmp_path / f"cpu-{age % 2}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setattr(environment, "CACHE_BYTES", 250)
    environment._bound(str(tmp_path))
    assert {path.name for path in tmp_path.glob("*/*")} == {"newest", "newer"}
