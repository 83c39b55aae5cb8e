"""What the command line sets before JAX starts: the C allocator, and JAX's cache of programs.

A library that others import leaves both alone, so only `ping_llm.cli.main` calls `prepare`.
Nothing here goes over what the user has set in the environment.
"""

import atexit
import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from ping_llm.errors import ConfigError

KEEP_MEMORY, COMPILATION_CACHE = "PING_LLM_KEEP_MEMORY", "PING_LLM_COMPILATION_CACHE"

# glibc's mallopt: the name in MALLOC_NAME_ and glibc.malloc.name, the number, and our value. Freed
# buffers stay in one heap for the next step, which would otherwise fault in every page anew.
ALLOCATOR = (
    ("mmap_threshold", -3, 1 << 30),
    ("trim_threshold", -1, (1 << 31) - 1),
    ("arena_max", -8, 1),
    ("top_pad", -2, 256 << 20),
)

CACHE_BYTES = 1 << 30
# Every program is kept, however small. XLA's own cache of GPU tuning would add nothing to that.
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
}
CACHE_OWN = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_ENABLE_COMPILATION_CACHE",
)
CACHE_ERROR = r"Error (reading|writing) persistent compilation cache entry for '([^']*)'"

_memory_kept = False


def prepare() -> None:
    """Keeps freed memory and compiled programs, unless the user's environment says otherwise.

    Call it before anything imports JAX.

    Raises:
        ConfigError: If one of our variables is neither `on` nor `off`.
    """
    global _memory_kept
    keep, cache = _is_on(KEEP_MEMORY), _is_on(COMPILATION_CACHE)
    _memory_kept = keep and _keep_memory()
    root, cpu = _cache_root(), _cpu()
    if cache and root and cpu and not any(name in os.environ for name in CACHE_OWN):
        _use_cache(root, os.path.join(root, cpu))


def in_force() -> dict[str, object]:
    """Returns what holds in this process, for a report.

    Keys: `memory_kept`; `compilation_cache`, its directory or None; `variables`, those of the
    environment that change how JAX and the allocator work.
    """
    names = ("JAX_", "XLA_", "MALLOC_", "GLIBC_TUNABLES", "PING_LLM_")
    return {
        "memory_kept": _memory_kept,
        "compilation_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(names)},
    }


def problem() -> str | None:
    """Returns what is wrong with JAX_PLATFORMS; None: nothing, or JAX was not asked for devices."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not asked or jax is None:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return f"JAX_PLATFORMS={asked}: JAX finds no such device; unset it, or set it to cpu"
    return None


def _is_on(name: str) -> bool:
    value = os.environ.get(name, "on")
    if value not in ("on", "off"):
        raise ConfigError(f"{name} is {value!r}; set it to on or off")
    return value == "on"


def _keep_memory() -> bool:
    """Returns whether the allocator is glibc's and took all settings."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for name, _, _ in ALLOCATOR:
        own = any(key.startswith(f"MALLOC_{name.upper()}") for key in os.environ)
        if own or f"glibc.malloc.{name}=" in tunables:
            return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    taken = [libc.mallopt(number, value) == 1 for _, number, value in ALLOCATOR]
    return all(taken)


def _cache_root() -> str | None:
    """Returns the directory of all our compiled programs, or None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "ping-llm", "compiled") if os.path.isabs(base) else None


def _cpu() -> str | None:
    """Returns a name for this CPU and the number of cores in use; None where nothing tells.

    JAX's keys hold neither. A program for another CPU, from a home directory that machines share,
    could use instructions that this one lacks, and one compiled on a single core stays on it.
    """
    try:
        with open("/proc/cpuinfo") as lines:
            first = "".join(iter(lines.readline, "\n"))
    except OSError:
        return None
    keys = ("cpu", "vendor", "model", "stepping", "flags", "features", "isa", "uarch")
    stable = [line for line in first.splitlines() if line.lower().startswith(keys)]
    described = "\n".join(line for line in stable if "MHz" not in line)
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    return f"{digest}-{len(os.sched_getaffinity(0))}" if described else None


def _use_cache(root: str, directory: str) -> None:
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if os.stat(directory).st_uid != os.getuid():
            return  # programs are code, and only the user's own are to be trusted
    except OSError:
        return  # a home that is missing or read-only: compile as if there were no cache
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    for name, value in CACHE.items():
        os.environ.setdefault(name, value)
    show = warnings.showwarning

    def show_unless_cache(message, *args, **kwargs) -> None:
        error = re.match(CACHE_ERROR, str(message))
        if not error:
            show(message, *args, **kwargs)
        elif error[1] == "reading":  # JAX never rewrites an entry, not even a damaged one
            for path, _ in _entries(directory):
                if os.path.basename(path).startswith(f"{error[2]}-"):
                    _remove(path)

    warnings.filterwarnings("always", message=CACHE_ERROR)
    warnings.showwarning = show_unless_cache
    atexit.register(_bound, root)


def _bound(root: str) -> None:
    """Removes what was not used for longest until `CACHE_BYTES` are left.

    JAX can bound the cache itself (`jax_compilation_cache_max_size`), but then takes a lock for
    each program, for which it waits up to 10 s, and a process killed between the two files of an
    entry ends all writing for good.
    """
    if "jax" not in sys.modules:
        return
    held = [entry for directory, _ in _entries(root) for entry in _entries(directory)]
    held.sort(key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime), reverse=True)
    excess = sum(stat.st_size for _, stat in held) - CACHE_BYTES
    while excess > 0:
        path, stat = held.pop()
        _remove(path)
        excess -= stat.st_size


def _entries(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    with contextlib.suppress(OSError):  # other processes remove entries, too
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                yield entry.path, entry.stat()


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Lets SIGINT and SIGTERM wait, where what would be interrupted cannot be ended halfway.

    XLA compiles on, and crashes when Python exits; Orbax takes them for errors of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, lambda signum, _: held.append(signum)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        for signum in held:
            signal.raise_signal(signum)
