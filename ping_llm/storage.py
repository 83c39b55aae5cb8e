"""Files wherever they are: local paths, `gs://bucket/...` and `s3://bucket/...`.

Bytes in bulk go through Arrow's file systems, which find credentials as the clouds' own tools do.
What several writers share goes through `KeyValueStore`, which can create a value only where there
is none, and swap one for another.
"""

import dataclasses
import fcntl
import fnmatch
import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pyarrow import fs

from ping_llm.errors import LockedError, StorageError

REMOTE = ("gs://", "s3://")
RETRIES = {"max_retries": 12, "initial_delay": "500ms", "max_delay": "30s"}  # 3.5 to 7 minutes
LOCK_S = 10.0  # for which a local file may be locked by another process
REFUSALS = 8  # of a write whose condition holds


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """One file found.

    Attributes:
        url: Path or URL, as `open_input` takes it.
        size: Bytes.
    """

    url: str
    size: int


def is_remote(url: str | Path) -> bool:
    """Returns whether `url` names an object store."""
    return str(url).startswith(REMOTE)


def join(url: str | Path, name: str) -> str:
    """Returns the path or URL of `name` below `url`."""
    return f"{str(url).rstrip('/')}/{name}"


def _filesystem(url: str) -> tuple[fs.FileSystem, str, str]:
    """Returns (file system, path within it, prefix that turns a path back into a URL)."""
    if not is_remote(url):
        if "://" in url:
            raise StorageError(f"{url}: unknown scheme; expected a local path, gs:// or s3://")
        return fs.LocalFileSystem(), os.path.abspath(url), ""
    scheme, _, path = url.partition("://")
    authority, _, key = path.partition("/")  # `anonymous@bucket` reads a public bucket
    if not authority:
        raise StorageError(f"{url}: it names no bucket; expected {scheme}://bucket/path")
    try:
        if scheme == "s3":
            filesystem, bucket = _s3(authority)
        else:
            filesystem, bucket = fs.FileSystem.from_uri(f"{scheme}://{authority}")
    except (OSError, ValueError) as error:
        raise StorageError(f"{url}: {error}") from None
    prefix = f"{scheme}://{authority.removesuffix(bucket)}"
    return filesystem, f"{bucket}/{key}", prefix


def _s3(authority: str) -> tuple[fs.FileSystem, str]:
    """Returns (Arrow's S3, bucket); unlike `from_uri` it goes on for as long as our own writes."""
    user, _, bucket = authority.rpartition("@")
    endpoint, region = _s3_place()
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    where = urlsplit(endpoint or "https://")
    s3 = fs.S3FileSystem(
        anonymous=user == "anonymous",
        region=region,
        endpoint_override=where.netloc or None,
        scheme=where.scheme,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES["max_retries"] + 1),
    )
    return s3, bucket


def _s3_place() -> tuple[str | None, str | None]:
    """Returns (URL of the endpoint, region), as the environment has them."""
    env = os.environ.get
    endpoint = env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    return endpoint, env("AWS_REGION") or env("AWS_DEFAULT_REGION")


def find(pattern: str | Path) -> list[StoredFile]:
    """Returns the files that a file, directory or glob names, sorted by URL.

    A directory stands for all files below it but hidden ones (names that begin with `.` or `_`).

    Raises:
        StorageError: Nothing is there, or it cannot be listed.
    """
    pattern = str(pattern)
    filesystem, path, prefix = _filesystem(pattern)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            return [StoredFile(prefix + info.path, info.size)]
        if info.type == fs.FileType.Directory:
            base, wanted = path, None
        else:
            fixed = path[: min((path.find(c) for c in "*?[" if c in path), default=len(path))]
            base, wanted = fixed.rpartition("/")[0] or "/", path
            if fixed == path:
                raise StorageError(f"{pattern} does not exist")
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        found = [f for f in filesystem.get_file_info(selector) if f.type == fs.FileType.File]
    except OSError as error:
        raise StorageError(f"{pattern} cannot be listed: {error}") from None
    if wanted is None:
        below = len(base.rstrip("/")) + 1
        hidden = (".", "_")
        found = [
            f for f in found if not any(p.startswith(hidden) for p in f.path[below:].split("/"))
        ]
    else:
        # One `*` stays within one directory, as in a shell.
        parts = wanted.split("/")
        found = [f for f in found if _matches(f.path.split("/"), parts)]
    if not found:
        raise StorageError(f"{pattern}: no file there")
    return sorted((StoredFile(prefix + f.path, f.size) for f in found), key=lambda f: f.url)


def _matches(names: list[str], patterns: list[str]) -> bool:
    pairs = zip(names, patterns, strict=False)
    return len(names) == len(patterns) and all(
        fnmatch.fnmatchcase(n, p) and n.startswith(".") <= p.startswith(".") for n, p in pairs
    )


def open_input(url: str | Path) -> BinaryIO:
    """Returns a seekable binary file to read.

    Raises:
        StorageError: It is absent or cannot be read.
    """
    filesystem, path, _ = _filesystem(str(url))
    try:
        return filesystem.open_input_file(path)
    except OSError as error:
        raise StorageError(f"{url} cannot be read: {error}") from None


def exists(url: str | Path) -> bool:
    """Returns whether there is a file of that name."""
    filesystem, path, _ = _filesystem(str(url))
    try:
        return filesystem.get_file_info(path).type == fs.FileType.File
    except OSError as error:
        raise StorageError(f"{url} cannot be reached: {error}") from None


def upload_directory(local: Path, url: str, *, last: str) -> None:
    """Copies the files of the directory `local` to `url`, the file named `last` after the others.

    So whoever sees `last` sees them all.

    Raises:
        StorageError: A copy failed; `last` is then not there.
    """
    filesystem, path, _ = _filesystem(url)
    names = sorted(p.name for p in local.iterdir() if p.is_file())
    for name in [*(n for n in names if n != last), last]:
        try:
            with (
                open(local / name, "rb") as source,
                filesystem.open_output_stream(f"{path.rstrip('/')}/{name}") as sink,
            ):
                shutil.copyfileobj(source, sink, 8 << 20)
        except OSError as error:
            raise StorageError(f"{join(url, name)} cannot be written: {error}") from None


def local_directory(url: str | Path, *, identity: str) -> Path:
    """Returns a local directory with the files below `url`, which one can memory-map.

    A local `url` is returned as it is. A remote one is copied once into the user's cache
    (`$XDG_CACHE_HOME/ping-llm`), under a name made of `url` and the content of the file named
    `identity`: when that changes, so does the copy.

    Raises:
        StorageError: There is no file `identity` below `url`, or a copy failed.
    """
    if not is_remote(url):
        return Path(url)
    with open_input(join(url, identity)) as file:
        key = hashlib.sha256(str(url).encode() + b"\0" + file.read()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ping-llm"
    target = root / key
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=root))
    try:
        for file in find(url):
            with open_input(file.url) as source, open(building / Path(file.url).name, "wb") as sink:
                shutil.copyfileobj(source, sink, 8 << 20)
        building.rename(target)
    except OSError as error:
        if not target.is_dir():  # else: another process was first, with the same content
            raise StorageError(f"{url} cannot be copied to {target}: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


_LOCK = ".__lock"  # what TensorStore's local driver leaves when it is killed


class KeyValueStore:
    """Small values below one URL, with the conditional writes that concurrent writers need.

    A condition is checked and the value written as one step, on local disks and object stores.
    What an object store does not answer, or answers with a 5xx, is asked again for some
    minutes, less and less often; then it is an error that names the object.

    Attributes:
        url: The place.
        context: TensorStore's, for arrays in it.
    """

    def __init__(self, url: str | Path):
        """Opens the place `url`; nothing need be there yet."""
        import tensorstore

        self.url = str(url).rstrip("/")
        # Shared by all that is opened below, so that credentials are looked for once.
        self.context = tensorstore.Context()
        spec = _kvstore_spec(self.url)
        self._kv = tensorstore.KvStore.open(spec, context=self.context).result()

    def spec(self, key: str) -> dict[str, Any]:
        """Returns what TensorStore needs to open an array below `key`, beside the `context`."""
        return _kvstore_spec(join(self.url, key))

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
            present, found = self.read(key)
            if present == value:
                return found
            if found != generation:
                return None
        where = join(self.url, key)
        raise StorageError(f"{where} cannot be written: its condition is refused, though it holds")

    def keys(self, prefix: str) -> list[str]:
        """Returns the keys that begin with `prefix`, sorted."""
        import tensorstore

        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        found = self._wait(
            "listed", prefix, self._kv.list(tensorstore.KvStore.KeyRange(prefix, end))
        )
        return sorted(key for key in map(bytes.decode, found) if not key.endswith(_LOCK))

    def delete(self, prefix: str) -> None:
        """Deletes every key that begins with `prefix`."""
        import tensorstore

        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        key_range = tensorstore.KvStore.KeyRange(prefix, end)
        self._wait("deleted", prefix, self._kv.delete_range(key_range))
        if prefix.endswith("/") and not is_remote(self.url):
            shutil.rmtree(join(self.url, prefix), ignore_errors=True)  # directories, empty now

    def _empty_stale_lock(self, key: str) -> None:
        """Empties the lock file of a writer that was killed.

        On local disks TensorStore writes a value into the lock file, then renames it. What a killed
        writer left there it does not cut off: the end of it would stand behind a shorter value.
        """
        if is_remote(self.url):
            return
        path = join(self.url, key) + _LOCK
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:  # there is none
            return
        try:
            _lock_at_once(lock)
            # Renamed meanwhile it would be the value itself; locked, it cannot be renamed any more.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                os.ftruncate(lock, 0)
        except (BlockingIOError, PermissionError, FileNotFoundError):  # its writer lives
            pass
        finally:
            os.close(lock)

    def _wait(self, what: str, key: str, pending: Any, lock_s: float | None = None) -> Any:
        try:
            return pending.result(None if is_remote(self.url) else lock_s)
        except TimeoutError:
            raise LockedError(
                f"{join(self.url, key)} cannot be {what}: another process has had it locked for "
                f"{lock_s:.0f} s; continue that process, or end it"
            ) from None
        except (ValueError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise StorageError(f"{join(self.url, key)} cannot be {what}: {reason}") from None


def _lock_at_once(file: int) -> None:
    """Locks an open file, on Linux as TensorStore does, against its other openings here too.

    `fcntl.lockf` would not: to it, the threads of a process are one.

    Raises:
        BlockingIOError: It is locked.
    """
    if hasattr(
        fcntl, "F_OFD_SETLK"
    ):  # Linux: a lock of the open file, fcntl(2); 64-bit `struct flock`
        all_of_it = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, all_of_it)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _kvstore_spec(url: str) -> dict[str, Any]:
    if not is_remote(url):
        if "://" in url:
            raise StorageError(f"{url}: unknown scheme; expected a local path, gs:// or s3://")
        return {"driver": "file", "path": os.path.abspath(url) + "/"}
    scheme, _, rest = url.partition("://")
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
    endpoint, region = _s3_place()
    optional = {"endpoint": endpoint, "aws_region": region, "aws_credentials": credentials}
    spec["s3_request_retries"] = RETRIES
    return {"driver": "s3", **spec, **{key: value for key, value in optional.items() if value}}
