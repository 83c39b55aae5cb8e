"""Outputs: claimed by one process, published in one move, known again by their content.

Work goes on in a private directory and reaches its place whole. Locally that directory is beside
the target (in it, where the target is a directory already), so that a rename is enough; for an
object store it is in the user's temporary directory. It is locked while its process lives: what a
killed process left is removed by the next one that publishes the same output.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.hashing import digest, file_digest
from ping_llm.progress import progress
from ping_llm.storage import Location, StoredFile
from ping_llm.text import safe

LEASE_S = 60.0  # a claim in an object store is free so long after its last renewal
UNFINISHED = ".unfinished"  # lists the names of a directory that is being filled
_INSIDE = ".ping-llm.lock"

# --- publishing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def publish_file(location: Location, *, claim: "Claim | None" = None) -> Iterator[Path]:
    """Yields the path of a private file to write, which becomes `location` if all goes well.

    Whoever reads `location` sees the old file or the new one, whole. After an error nothing is
    left of the new one.

    Args:
        location: The file, local or remote; local directories above it are made.
        claim: The claim under which it is written; a lost one is an error.

    Raises:
        ConfigError: `location` is something else than a file.
        StorageError: It cannot be written, or the claim is lost.
    """
    with _named(location):
        if location.is_local and location.path.exists() and not location.path.is_file():
            raise ConfigError(f"{location} exists and is not a file; choose another output")
        with _private_directory(location, location.parent) as private:
            path = private / location.name
            yield path
            _flush(path)
            if claim is not None:
                claim.check()
            if location.is_local:
                os.replace(path, location.path)
                _flush(location.path.parent)
            else:
                location.upload(path)


def publish_text(location: Location, text: str, *, claim: "Claim | None" = None) -> None:
    """Writes `text` to a file as UTF-8, as `publish_file` does."""
    with publish_file(location, claim=claim) as path:
        path.write_text(text, encoding="utf-8", newline="")


def publish_json(location: Location, content: Any, *, claim: "Claim | None" = None) -> None:
    """Writes what JSON can hold to a file, indented, as `publish_file` does."""
    publish_text(location, json.dumps(content, indent=2) + "\n", claim=claim)


@contextlib.contextmanager
def publish_directory(
    location: Location, *, last: str, claim: "Claim | None" = None
) -> Iterator[Path]:
    """Yields a private, empty local directory that becomes `location` if all goes well.

    A new local directory appears in one move. One that exists (empty, or a mount point) and one in
    an object store are filled name by name, `last` last: whoever sees `last` sees all. If that is
    cut short, the next publication replaces what it left.

    Args:
        location: The directory; local directories above it are made.
        last: Name of the file that says that the rest is there.
        claim: The claim under which it is written; a lost one is an error.

    Raises:
        ConfigError: `location` is not empty (hidden files do not count), or not a directory.
        StorageError: It cannot be written, or the claim is lost.
    """
    with _named(location):
        is_new = location.is_local and not location.path.is_dir()
        if is_new and os.path.lexists(location.path):
            raise ConfigError(f"{location} exists and is not a directory; choose another output")
        _interrupted(location, last)  # refuses before the work
        with _private_directory(location, location.parent if is_new else location) as private:
            content = private / "content"
            content.mkdir()
            yield content
            for path in (*content.rglob("*"), content):
                _flush(path)
            if claim is not None:
                claim.check()
            if is_new:
                os.rename(content, location.path)
                _flush(location.path.parent)
            else:
                _fill(location, content, last)


def number_files(files: Sequence[Path], name: str) -> list[Path]:
    """Returns the files of a private directory under their final names, now that all are written.

    Args:
        files: The files, in order.
        name: What the names begin with: `name-00000-of-00004.arrow`, with the files' own endings.
    """
    names = [f"{name}-{i:05d}-of-{len(files):05d}{file.suffix}" for i, file in enumerate(files)]
    return [file.rename(file.with_name(new)) for file, new in zip(files, names, strict=True)]


def contents(location: Location) -> list[str]:
    """Returns the names in a directory that count as its content: no hidden ones, no lost+found."""
    return [n for n in location.names() if not n.startswith(".") and n != "lost+found"]


def _interrupted(location: Location, last: str) -> list[str]:
    """Returns the names in `location` that a publication left which was cut short."""
    names = contents(location)
    marker = location / UNFINISHED
    ours = marker.read_text().splitlines() if names and marker.is_file() else []
    if last in names or not set(names) <= set(ours):
        raise ConfigError(
            f"{location} exists and is not empty; choose another output, or remove it"
        )
    return names


def _fill(location: Location, content: Path, last: str) -> None:
    names = sorted(os.listdir(content), key=lambda name: (name == last, name))
    for name in _interrupted(location, last):
        (location / name).remove()
    publish_text(location / UNFINISHED, "".join(f"{name}\n" for name in names))
    if location.is_local:
        for name in names:
            os.rename(content / name, location.path / name)
        _flush(location.path)
    else:
        for name in names:
            for path in sorted([content / name, *(content / name).rglob("*")]):
                if path.is_file():
                    (location / path.relative_to(content).as_posix()).upload(path)
    (location / UNFINISHED).remove()


@contextlib.contextmanager
def _named(location: Location) -> Iterator[None]:
    """Makes the errors of the operating system name the output."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space or choose another output" if full else ""
        reason = error.strerror or error
        raise StorageError(f"{location} cannot be written: {reason}{hint}") from error


@contextlib.contextmanager
def _private_directory(location: Location, parent: Location) -> Iterator[Path]:
    """Yields an empty directory of this user alone, in `parent` or the temporary directory."""
    around = parent.path if parent.is_local else Path(tempfile.gettempdir())
    around.mkdir(parents=True, exist_ok=True)
    name = location.path.absolute().name if location.is_local else str(location)
    prefix = f".ping-llm-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}-"
    for left in os.listdir(around):
        if left.startswith(prefix):
            _remove_if_dead(around / left)
    while True:
        private = Path(tempfile.mkdtemp(prefix=prefix, dir=around))
        with contextlib.suppress(FileNotFoundError):  # another took it for one that was left
            if (lock := _lock(private / "lock")) is not None:
                break
    try:
        (private / "work").mkdir()
        yield private / "work"
    finally:
        _unlock(lock)
        shutil.rmtree(private, ignore_errors=True)


def _remove_if_dead(private: Path) -> None:
    with contextlib.suppress(OSError):  # of another user, or gone by now
        status = os.lstat(private)
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if is_ours and (lock := _lock(private / "lock")) is not None:
            shutil.rmtree(private, ignore_errors=True)
            _unlock(lock)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems: no directories
            raise
    finally:
        os.close(file)


# --- locks of files ------------------------------------------------------------------------------

_locks: set[int] = set()  # open files of this process


def _forget_locks() -> None:
    """Closes the parent's locks in a fork, where they would outlive the parent."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _lock(path: Path, *, shared: bool = False) -> int | None:
    """Returns a locked file at `path`, made if need be; None where another opening has the lock."""
    while True:
        lock, held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), False
        _locks.add(lock)
        try:
            status = os.fstat(lock)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # planted by someone
                raise OSError(errno.EPERM, f"{path} is not a lock file")
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = os.path.samestat(status, os.lstat(path))
        except FileNotFoundError:  # its holder has removed it meanwhile
            pass
        except BlockingIOError:
            return None
        finally:
            if not held:
                _unlock(lock)
        if held:
            return lock


def _unlock(lock: int) -> None:
    _locks.discard(lock)
    os.close(lock)


# --- claims --------------------------------------------------------------------------------------


class Claim:
    """An output that this process alone writes, until the end of the `claim` context.

    Attributes:
        location: The output.
    """

    def __init__(self, location: Location, what: str, shared: bool):
        self.location, self._shared = location, shared
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._me = f"{what}, pid {os.getpid()} on {socket.gethostname()}, since {since}"

    def check(self) -> None:
        """Makes sure, before something is published, that the output is still this process's.

        Raises:
            StorageError: Another process has taken it.
        """

    def _refused(self, holder: str, more: str = "") -> ConfigError:
        named = f" ({safe(holder)[:200]})" if holder else ""
        return ConfigError(
            f"{self.location} is being written by another process{named}; let it finish or choose "
            f"another output{more}"
        )


class _LocalClaim(Claim):
    """A lock on a file beside the output, or in it where only that can be shared or written."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        path = self.location.path
        with _named(self.location):
            target = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
            alone = os.path.ismount(target) or not os.access(target.parent, os.W_OK)
            inside = target.is_dir() and alone
            path = target / _INSIDE if inside else target.parent / f".{target.name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path, shared=self._shared)
        if lock is None:
            holder = ""
            with contextlib.suppress(OSError):  # it has ended meanwhile
                holder = path.read_text(encoding="utf-8", errors="replace")
            raise self._refused(holder)
        try:
            with contextlib.suppress(OSError):  # on a full disk the refusal of others names nobody
                os.ftruncate(lock, 0)
                os.pwrite(lock, self._me.encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):  # still shared with others, or out of reach by now
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            _unlock(lock)


class _Lease(Claim):
    """An object beside the output that says until when it is claimed, and is renewed."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._kv, self._key = self.location.parent.kv(), f".{self.location.name}.lock"
        self._lost, self._expires = True, 0.0
        self._renewing, self._stop = threading.Lock(), threading.Event()
        while self._lost:
            value, self._generation = self._kv.read(self._key)
            self._lost = False
            holder, left = _read_lease(value)
            if left > 0:
                more = f"; if that was killed, its claim runs out in {math.ceil(left)} s"
                raise self._refused(holder, more)
            if self._shared:
                yield
                return
            self._renew()
        thread = threading.Thread(target=self._keep_renewing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(LEASE_S / 6)
            # Deleted only while nobody can take it: on S3 that is not one step.
            if not thread.is_alive() and self._is_sure():
                try:
                    self._kv.remove(self._key, self._generation)
                except StorageError as error:  # then it runs out
                    print(f"claim not released: {error}", file=sys.stderr, flush=True)

    def _renew(self) -> None:
        with self._renewing:
            if self._lost:
                return
            expires = time.time() + LEASE_S
            lease = {"holder": self._me, "expires": expires, "nonce": secrets.token_hex(8)}
            written = self._kv.swap(self._key, json.dumps(lease).encode(), self._generation)
            self._lost = written is None
            if written is not None:
                self._generation, self._expires = written, expires

    def _keep_renewing(self) -> None:
        while not self._stop.wait(LEASE_S / 4) and not self._lost:
            try:
                self._renew()
            except StorageError as error:  # the next one may arrive in time
                print(f"claim not renewed: {error}", file=sys.stderr, flush=True)

    def _is_sure(self) -> bool:
        """Returns whether nobody can have taken it, whose clock is LEASE_S / 6 ahead at most."""
        return self._shared or (not self._lost and time.time() < self._expires - LEASE_S / 6)

    def check(self) -> None:
        if not self._is_sure():
            self._renew()  # late, but perhaps nobody took it
        if self._lost:
            raise StorageError(
                f"{self.location} was taken over by another process while this one had not renewed "
                f"its claim for {LEASE_S:.0f} s; nothing more was written; let the other one finish"
            )


def _read_lease(value: bytes | None) -> tuple[str, float]:
    """Returns (who holds a lease, seconds for which it runs); what is no lease has run out."""
    try:
        lease = json.loads(value or b"")
        return str(lease["holder"]), float(lease["expires"]) - time.time()
    except (ValueError, KeyError, TypeError):
        return "", 0.0


@contextlib.contextmanager
def claim(
    location: Location,
    *,
    what: str,
    settings: Any = None,
    stored: Callable[[], Mapping[str, Any] | None] | None = None,
    shared: bool = False,
) -> Iterator[Claim]:
    """Makes `location` this process's own to write; any other is refused at once.

    A local claim is a lock, which ends with its process, also when that is killed; threads of one
    process count as several. In an object store it is a lease, renewed four times in `LEASE_S`
    seconds, which a killed process leaves to run out. It names the time at which it does; so the
    clocks of the machines must agree within `LEASE_S / 6` seconds.

    Nothing is stored in the output: settings are, by the first publication.

    Args:
        location: A file or directory; it need not exist.
        what: The command, for messages.
        settings: What the output is to be written with.
        stored: Returns what it was begun with, or None; asked when the claim is held.
        shared: Whether other processes may hold it too that share it: the workers of one store.
            (Of the processes of one training, the first claims for all.) In an object store a
            shared claim only looks for one that is not.

    Raises:
        ConfigError: Another process holds it, or the stored settings are others.
        StorageError: It cannot be claimed.
    """
    own = (_LocalClaim if location.is_local else _Lease)(location, what, shared)
    with own.held():
        if stored is not None and (before := stored()) is not None:
            from ping_llm.settings import refuse_changes

            refuse_changes(before, settings, location)
        yield own


# --- content -------------------------------------------------------------------------------------


class FileDigest(NamedTuple):
    """What a file holds, wherever it is.

    Attributes:
        name: Last component of its name.
        size: Bytes.
        sha256: Of all its content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


def digest_files(
    files: Sequence[StoredFile], *, workers: int = 8, shown: bool = True
) -> list[FileDigest]:
    """Returns the digest of each file, in their order; reads them whole, in `workers` threads.

    Args:
        files: The files.
        workers: How many are read at once.
        shown: Whether progress is.

    Raises:
        DataError: A file breaks off or cannot be read.
        StorageError: A file is absent.
    """
    total, digests = sum(file.size for file in files), []
    bar = progress("hash", total=total, unit="bytes") if shown else contextlib.nullcontext()
    with ThreadPoolExecutor(workers) as pool, bar as opened:
        for each in pool.map(_digest_file, files):
            digests.append(each)
            if opened is not None:
                opened.update(each.size)
    return digests


def _digest_file(file: StoredFile) -> FileDigest:
    try:
        raw = file.location.open_input()
        with io.BufferedReader(raw, 4 << 20) as content:  # pyright: ignore[reportArgumentType]
            return FileDigest(file.location.name, file.size, file_digest(content))
    except OSError as error:
        raise DataError(f"{file.location} cannot be read: {error}") from None


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """Returns a hash of (name, size, SHA-256 of the content) of files, whatever their order.

    It is the one identity of a data set. Of one that lists these in its own metadata, it takes no
    reading; what making the files cost in time and memory is no part of it.
    """
    return digest(sorted([name, size, sha256] for name, size, sha256 in files))


def content_fingerprint(location: Location) -> str:
    """Returns the `fingerprint` of the files that a file, directory or glob names.

    Raises:
        StorageError: There is none.
        DataError: One cannot be read.
    """
    return fingerprint(digest_files(location.find()))
