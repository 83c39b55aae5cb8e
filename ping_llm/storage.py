"""Files wherever they are: local paths, `gs://bucket/...` and `s3://bucket/...`.

`Location` is what a user names. Bytes in bulk go through Arrow's file systems, which find
credentials as the clouds' own tools do. What several writers share goes through `KeyValueStore`,
which can create a value only where there is none, and swap one for another.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pyarrow import fs

from ping_llm.errors import DataError, LockedError, StorageError
from ping_llm.text import safe

REMOTE = ("gs://", "s3://")
RETRIES = {"max_retries": 12, "initial_delay": "500ms", "max_delay": "30s"}  # 3.5 to 7 minutes
LOCK_S = 10.0  # for which a local file may be locked by another process
REFUSALS = 8  # of a write whose condition holds
CONNECT_S = 10.0  # within which an object store must take a connection
NOTICE_S = 15.0  # after which an operation that goes on says so


@contextlib.contextmanager
def _operation(location: "Location", what: str) -> Iterator[None]:
    """Makes the errors of the file system name the location, and what cannot be done with it.

    One that takes long, because an object store does not answer, says so meanwhile.
    """
    waiting = None if location.is_local else threading.Timer(NOTICE_S, _notice, [location])
    if waiting is not None:
        waiting.daemon = True
        waiting.start()
    try:
        yield
    except OSError as error:
        raise StorageError(f"{location} cannot be {what}: {error}") from None
    finally:
        if waiting is not None:
            waiting.cancel()


def _notice(location: object) -> None:
    print(f"still waiting for {location}: the store does not answer", file=sys.stderr, flush=True)


@functools.cache
def _check_reachable(endpoint: str) -> None:
    """Raises a `StorageError` where no server takes a connection; asked once a process."""
    parts = urlsplit(endpoint)
    if getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname or ""):
        return  # another server asks it for us
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname or "", port), CONNECT_S).close()
    except OSError as error:
        raise StorageError(
            f"{endpoint} cannot be reached: {error}; check the network, and the address in the "
            "environment if the store is not the public one"
        ) from None


@dataclasses.dataclass(frozen=True, order=True)
class Location:
    """A file, a directory, or a glob that a user names, local or in an object store.

    `str(location)` is the path or URL as it was given, less slashes at its end.

    Attributes:
        url: That text.
    """

    url: str

    def __post_init__(self) -> None:
        if not self.url or "\0" in self.url:
            raise StorageError(f"{self.url!r} is no path; expected a local path, gs:// or s3://")
        if self.url.encode(errors="replace").decode() != self.url:  # Arrow takes no such path
            raise StorageError(f"{self.url}: the path is not UTF-8; rename it")
        scheme, is_url, rest = self.url.partition("://")
        # pathlib makes gs:/x of gs://x, which would be a local directory.
        if f"{scheme}://" not in REMOTE if is_url else self.url.startswith(("gs:/", "s3:/")):
            raise StorageError(f"{self}: unknown scheme; expected a local path, gs:// or s3://")
        if is_url and not rest.partition("/")[0].rpartition("@")[2]:
            raise StorageError(f"{self}: it names no bucket; expected {scheme}://bucket/path")
        object.__setattr__(self, "url", self.url.rstrip("/") or "/")

    def __str__(self) -> str:
        return self.url

    @classmethod
    def of(cls, location: "str | Path | Location") -> "Location":
        """Returns the location of a path or URL; a location is returned as it is.

        Raises:
            StorageError: The text is empty, of an unknown scheme, or names no bucket.
        """
        return location if isinstance(location, Location) else cls(str(location))

    def __truediv__(self, name: str) -> "Location":
        """Returns the location of `name` below this one."""
        return Location(f"{self.url.rstrip('/')}/{name}")

    def child(self, name: object) -> "Location":
        """Returns the location of `name`, which a file says, right below this one.

        Raises:
            StorageError: `name` is anything but one path component of printable characters.
        """
        misleads = re.compile(r"\.{0,2}|.*[/\\].*")  # nowhere, upwards, or through directories
        if not isinstance(name, str) or not name.isprintable() or misleads.fullmatch(name):
            shown = safe(name)[:80]
            raise StorageError(f"{self}: `{shown}` is not the name of a file there; refusing it")
        return self / name

    @property
    def is_local(self) -> bool:
        """Whether it is on a file system of this machine."""
        return not self.url.startswith(REMOTE)

    @property
    def path(self) -> Path:
        """The local path.

        Raises:
            StorageError: The location is remote.
        """
        if not self.is_local:
            raise StorageError(f"{self} is remote; a local path is needed here")
        return Path(self.url)

    @property
    def name(self) -> str:
        """The last component; that of a whole bucket is the bucket."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The location one component up; a whole bucket is its own parent."""
        above = self.url.rpartition("/")[0]
        if above in ("gs:/", "s3:/"):
            return self
        return Location(above or ("/" if self.url.startswith("/") else "."))

    def _info(self) -> fs.FileInfo:
        filesystem, path, _ = _filesystem(self)
        with _operation(self, "reached"):
            return filesystem.get_file_info(path)

    def is_file(self) -> bool:
        """Returns whether there is a file of that name."""
        return self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        """Returns whether there is a directory, or in an object store anything below it."""
        return self._info().type == fs.FileType.Directory

    def exists(self) -> bool:
        """Returns whether there is anything of that name."""
        return self._info().type != fs.FileType.NotFound

    def size(self) -> int:
        """Returns the bytes of a file.

        Raises:
            StorageError: There is no file of that name.
        """
        info = self._info()
        if info.type != fs.FileType.File:
            raise StorageError(f"{self}: there is no file of that name")
        return info.size

    def names(self) -> list[str]:
        """Returns the names right below, sorted and with hidden ones; none where nothing is.

        Raises:
            StorageError: It is a file, or cannot be listed.
        """
        filesystem, path, _ = _filesystem(self)
        # Arrow lists directories in GCS only where an object stands for them.
        deep = self.url.startswith("gs://")
        selector = fs.FileSelector(path, allow_not_found=True, recursive=deep)
        with _operation(self, "listed"):
            found = filesystem.get_file_info(selector)
        below = len(path.rstrip("/")) + 1
        return sorted({info.path[below:].partition("/")[0] for info in found})

    def _listing(self) -> list[tuple[str, int, int]]:
        filesystem, path, _ = _filesystem(self)
        with _operation(self, "listed"):
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        return sorted((info.path, info.size, info.mtime_ns) for info in found if info.is_file)

    def total_bytes(self) -> int:
        """Returns the size of all files below a directory, hidden ones too."""
        return sum(size for _, size, _ in self._listing())

    def find(self) -> "list[StoredFile]":
        """Returns the files that a file, directory or glob names, sorted by URL.

        A directory stands for all files below it but hidden ones (names that begin with `.` or
        `_`).

        Raises:
            StorageError: Nothing is there, or it cannot be listed; or a name of a local one leads
                to no file: a dead link, a pipe.
        """
        filesystem, path, prefix = _filesystem(self)
        with _operation(self, "listed"):
            info = filesystem.get_file_info(path)
            if info.type == fs.FileType.File:
                return [StoredFile(Location(prefix + info.path), info.size)]
            if info.type == fs.FileType.Unknown:
                raise StorageError(f"{self} is a pipe or a device; give a regular file")
            if info.type == fs.FileType.Directory:
                base, wanted = path, None
            else:
                fixed = re.split(r"[*?[]", path)[0]
                base, wanted = fixed.rpartition("/")[0] or "/", path
                if fixed == path:
                    raise StorageError(f"{self} does not exist")
            below = len(base.rstrip("/")) + 1

            def is_meant(path: str) -> bool:
                if wanted is None:
                    return not re.search(r"(^|/)[._]", path[below:])
                # One `*` stays within one directory, as in a shell.
                return _matches(path.split("/"), wanted.split("/"))

            if self.is_local:
                _refuse_what_is_no_file(base, is_meant)
            selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
            files = [f for f in filesystem.get_file_info(selector) if f.is_file]
        files = [f for f in files if is_meant(f.path)]
        if not files:
            raise StorageError(f"{self}: no file there")
        return sorted(StoredFile(Location(prefix + f.path), f.size) for f in files)

    def open_input(self) -> BinaryIO:
        """Returns a seekable binary file to read.

        Raises:
            StorageError: It is absent or cannot be read.
        """
        filesystem, path, _ = _filesystem(self)
        with _operation(self, "read"):
            return filesystem.open_input_file(path)

    def read_bytes(self) -> bytes:
        """Returns the content of a file.

        Raises:
            StorageError: It is absent or cannot be read.
        """
        with self.open_input() as file, _operation(self, "read"):
            return file.read()

    def read_text(self) -> str:
        """Returns the content of a UTF-8 file.

        Raises:
            StorageError: It is absent or cannot be read.
            DataError: It is not UTF-8.
        """
        try:
            return self.read_bytes().decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise DataError(f"{self} cannot be read as UTF-8 text: {error}") from None

    def upload(self, local: Path) -> None:
        """Writes the content of a local file to this remote location.

        Raises:
            StorageError: It cannot be written.
        """
        filesystem, path, _ = _filesystem(self)

        def copy() -> None:
            with open(local, "rb") as source, filesystem.open_output_stream(path) as sink:
                shutil.copyfileobj(source, sink, 8 << 20)

        # Arrow takes a stream that an exception closes for a whole object. So the copy goes on in a
        # thread, where no signal interrupts it.
        with _operation(self, "written"), ThreadPoolExecutor(1) as pool:
            pool.submit(copy).result()

    def download(self, local: Path) -> None:
        """Copies the content of this file to a local path, whose directory is made if need be.

        Raises:
            StorageError: It is absent, or cannot be read or written.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        copied = _operation(self, f"copied to {local}")
        with self.open_input() as source, copied, open(local, "wb") as sink:
            shutil.copyfileobj(source, sink, 8 << 20)

    def remove(self) -> None:
        """Deletes a file, or a directory with all below it; nothing need be there.

        Raises:
            StorageError: It cannot be deleted.
        """
        filesystem, path, _ = _filesystem(self)
        kind = self._info().type
        with _operation(self, "deleted"):
            if kind == fs.FileType.File:
                filesystem.delete_file(path)
            elif kind == fs.FileType.Directory and self.is_local:
                filesystem.delete_dir(path)
            elif kind == fs.FileType.Directory:  # by prefix: Arrow expects an object `path/`
                self.parent.kv().delete(f"{self.name}/")

    def local_copy(self, *, identity: str | None = None) -> Path:
        """Returns a local directory with the files below this one, which one can memory-map.

        A local one is returned as it is. A remote one is copied once into the user's cache
        (`$XDG_CACHE_HOME/ping-llm`), under a name made of the URL and the content of the file
        named `identity`, or the names, sizes and times of all files: when these change, so does
        the copy.

        Raises:
            StorageError: There is no file `identity` below it, or a copy failed.
        """
        if self.is_local:
            return self.path
        content = repr(self._listing()).encode() if not identity else (self / identity).read_bytes()
        root, key = cache_root(), hashlib.sha256(self.url.encode() + b"\0" + content)
        target = root / key.hexdigest()[:24]
        if target.is_dir():
            return target
        root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=root))
        try:
            for file in self.find():
                copy = Location.of(building)
                for name in file.location.url.removeprefix(f"{self.url}/").split("/"):
                    copy = copy.child(name)
                file.location.download(copy.path)
            building.rename(target)
        except OSError as error:
            if not target.is_dir():  # else: another process was first, with the same content
                raise StorageError(f"{self} cannot be copied to {target}: {error}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target

    def kv(self) -> "KeyValueStore":
        """Returns the small values below this location."""
        return KeyValueStore(self)


def cache_root() -> Path:
    """Returns the user's cache directory for this package; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ping-llm"


@dataclasses.dataclass(frozen=True, order=True)
class StoredFile:
    """A file that is there.

    Attributes:
        location: Where it is.
        size: Bytes.
    """

    location: Location
    size: int


def _refuse_what_is_no_file(base: str, is_meant: Callable[[str], bool]) -> None:
    """Raises a `StorageError` where a name that is meant leads to no file: Arrow skips these."""
    for directory, _, names in os.walk(base):
        for path in (os.path.join(directory, name) for name in names):
            if not is_meant(path):
                continue
            Location(path)  # or its name is no UTF-8
            if os.path.islink(path) and not os.path.exists(path):
                raise StorageError(
                    f"{path} is a link to nothing; fetch its content (git-annex, DVC), or remove it"
                )
            if not os.path.isfile(path):
                raise StorageError(f"{path} is a pipe or a device; remove it")


def _filesystem(location: Location) -> tuple[fs.FileSystem, str, str]:
    """Returns (file system, path within it, prefix that turns a path back into a URL)."""
    url = location.url
    if location.is_local:
        return fs.LocalFileSystem(), os.path.abspath(url), ""
    scheme, _, path = url.partition("://")
    authority, _, key = path.partition("/")  # `anonymous@bucket` reads a public bucket
    _check_reachable(_endpoint(scheme))
    try:
        if scheme == "s3":
            filesystem, bucket = _s3(authority)
        else:
            filesystem, bucket = fs.FileSystem.from_uri(f"{scheme}://{authority}")
    except (OSError, ValueError) as error:
        raise StorageError(f"{url}: {error}") from None
    prefix = f"{scheme}://{authority.removesuffix(bucket)}"
    return filesystem, f"{bucket}/{key}".rstrip("/"), prefix


def _s3(authority: str) -> tuple[fs.FileSystem, str]:
    """Returns (Arrow's S3, bucket); unlike `from_uri` it goes on for as long as our own writes."""
    user, _, bucket = authority.rpartition("@")
    endpoint, region = _s3_endpoint()
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    parts = urlsplit(endpoint or "https://")
    s3 = fs.S3FileSystem(
        anonymous=user == "anonymous",
        region=region,
        endpoint_override=parts.netloc or None,
        scheme=parts.scheme,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES["max_retries"] + 1),
    )
    return s3, bucket


def _endpoint(scheme: str) -> str:
    """Returns the URL of the server that a scheme means here."""
    if scheme == "gs":
        emulators = "CLOUD_STORAGE_EMULATOR_ENDPOINT", "TENSORSTORE_GCS_HTTP_URL"
        return next(filter(None, map(os.environ.get, emulators)), "https://storage.googleapis.com")
    endpoint, region = _s3_endpoint()
    endpoint = endpoint or f"https://s3.{region or 'us-east-1'}.amazonaws.com"
    return endpoint if "://" in endpoint else f"https://{endpoint}"


def _s3_endpoint() -> tuple[str | None, str | None]:
    """Returns (URL of the endpoint, region), as the environment has them."""
    env = os.environ.get
    endpoint = env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    return endpoint, env("AWS_REGION") or env("AWS_DEFAULT_REGION")


def _matches(names: list[str], patterns: list[str]) -> bool:
    pairs = zip(names, patterns, strict=False)
    return len(names) == len(patterns) and all(
        fnmatch.fnmatchcase(n, p) and n.startswith(".") <= p.startswith(".") for n, p in pairs
    )


_LOCK = ".__lock"  # what TensorStore's local driver leaves when it is killed


class KeyValueStore:
    """Small values below one URL, with the conditional writes that concurrent writers need.

    A condition is checked and the value written as one step, on local disks and object stores.
    What an object store does not answer, or answers with a 5xx, is asked again for some
    minutes, less and less often; then it is an error that names the object.

    Attributes:
        url: The path or URL.
        context: TensorStore's, for arrays in it.
    """

    def __init__(self, url: str | Path | Location):
        """Opens the place `url`; nothing need be there yet."""
        import tensorstore

        self._location = Location.of(url)
        self.url = str(self._location)
        # Shared by all that is opened below, so that credentials are looked for once.
        self.context = tensorstore.Context()
        spec = _kvstore_spec(self._location)
        self._kv = tensorstore.KvStore.open(spec, context=self.context).result()

    def spec(self, key: str) -> dict[str, Any]:
        """Returns what TensorStore needs to open an array below `key`, beside the `context`."""
        return _kvstore_spec(self._location / key)

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """Returns (value, its generation); None where there is no value.

        The generation is what `swap` takes, also that of a value that is not there.
        """
        result = self._wait("read", key, self._kv.read(key))
        return (result.value if result.state == "value" else None), result.stamp.generation

    def write(self, key: str, value: bytes) -> None:
        """Writes a value, whatever is there."""
        self._empty_stale_lock(key)
        self._wait("written", key, self._kv.write(key, value))

    def create(self, key: str, value: bytes) -> bool:
        """Writes a value where there is none; returns whether it is this one that is there.

        As for `swap`, equal values count as one.
        """
        present, generation = self.read(key)
        return present is None and self.swap(key, value, generation) is not None

    def swap(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        """Writes a value in the place of that of `generation`.

        Returns its own generation, or None where the one in place is another and stays. Values are
        to be unlike those of other writers: a request whose answer was lost is sent again, and
        what is then in place is known by its value.

        Raises:
            LockedError: On a local disk, another process stopped while it wrote this value. If it
                goes on or ends, this value may still be written.
            StorageError: The value cannot be written.
        """
        for _ in range(REFUSALS):
            self._empty_stale_lock(key)
            pending = self._kv.write(key, value, if_equal=generation)
            written = self._wait("written", key, pending, LOCK_S).generation
            if written:
                return written
            present, current = self.read(key)
            if present == value:
                return current
            if current != generation:
                return None
        where = self._location / key
        raise StorageError(f"{where} cannot be written: its condition is refused, though it holds")

    def keys(self, prefix: str) -> list[str]:
        """Returns the keys that begin with `prefix`, sorted."""
        listed = self._wait("listed", prefix, self._kv.list(_keys_of(prefix)))
        return sorted(key for key in map(bytes.decode, listed) if not key.endswith(_LOCK))

    def delete(self, prefix: str) -> None:
        """Deletes every key that begins with `prefix`."""
        self._wait("deleted", prefix, self._kv.delete_range(_keys_of(prefix)))
        if prefix.endswith("/") and self._location.is_local:  # directories, empty now
            shutil.rmtree((self._location / prefix).path, ignore_errors=True)

    def remove(self, key: str, generation: bytes) -> None:
        """Deletes the value of `generation`; another one stays.

        S3 does it in two steps, a look and the deletion: no other is to write meanwhile.
        """
        self._wait("deleted", key, self._kv.write(key, None, if_equal=generation))

    def _empty_stale_lock(self, key: str) -> None:
        """Empties the lock file of a writer that was killed.

        On local disks TensorStore writes a value into the lock file, then renames it. What a killed
        writer left there it does not cut off: the end of it would stand behind a shorter value.
        """
        if not self._location.is_local:
            return
        path = f"{self._location / key}{_LOCK}"
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:  # there is none
            return
        is_in_use = contextlib.suppress(BlockingIOError, PermissionError, FileNotFoundError)
        with os.fdopen(lock), is_in_use:
            _lock_at_once(lock)
            # Renamed meanwhile it would be the value itself; locked, it cannot be renamed any more.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                os.ftruncate(lock, 0)

    def _wait(self, what: str, key: str, pending: Any, lock_s: float | None = None) -> Any:
        if not self._location.is_local:
            with contextlib.suppress(TimeoutError, ValueError, OSError, RuntimeError):
                pending.result(NOTICE_S)
            if not pending.done():
                _notice(self._location / key)
        try:
            return pending.result(lock_s if self._location.is_local else None)
        except TimeoutError:
            raise LockedError(
                f"{self._location / key} cannot be {what}: another process has had it locked for "
                f"{lock_s:.0f} s; continue that process, or end it"
            ) from None
        except (ValueError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise StorageError(f"{self._location / key} cannot be {what}: {reason}") from None


def _keys_of(prefix: str) -> Any:
    """Returns the range of the keys that begin with `prefix`."""
    import tensorstore

    end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    return tensorstore.KvStore.KeyRange(prefix, end)


def _lock_at_once(file: int) -> None:
    """Locks an open file, on Linux as TensorStore does, against its other openings here too.

    `fcntl.lockf` would not: to it, the threads of a process are one.

    Raises:
        BlockingIOError: It is locked.
    """
    if hasattr(fcntl, "F_OFD_SETLK"):  # Linux: a lock of the open file, see fcntl(2)
        # A `struct flock` of 64 bits: the whole file, from its start.
        all_of_it = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, all_of_it)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _kvstore_spec(location: Location) -> dict[str, Any]:
    if location.is_local:
        return {"driver": "file", "path": os.path.abspath(location.url) + "/"}
    scheme, _, rest = location.url.partition("://")
    _check_reachable(_endpoint(scheme))
    authority, _, path = rest.partition("/")
    user, _, bucket = authority.rpartition("@")
    spec: dict[str, Any] = {"bucket": bucket, "path": path.rstrip("/") + "/" if path else ""}
    if scheme == "gs":
        return {"driver": "gcs", **spec, "gcs_request_retries": RETRIES}
    env = os.environ.get
    credentials = None  # None: looked for wherever AWS's own tools look
    if user == "anonymous":
        credentials = {"type": "anonymous"}
    elif env("AWS_ACCESS_KEY_ID") and env("AWS_SECRET_ACCESS_KEY"):
        credentials = {"type": "environment"}  # the first place, without asking the others
    endpoint, region = _s3_endpoint()
    optional = {"endpoint": endpoint, "aws_region": region, "aws_credentials": credentials}
    spec["s3_request_retries"] = RETRIES
    return {"driver": "s3", **spec, **{key: value for key, value in optional.items() if value}}
