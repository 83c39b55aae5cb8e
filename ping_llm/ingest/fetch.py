"""Inputs that are no files yet: `https://`, `hf://` and standard input, fetched to files first.

A server that takes ranges (RFC 9110, 14) is asked for several at once, and a break costs no more
than the range it cut. From another the whole is streamed, and begun anew after a break.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from ping_llm.errors import StorageError
from ping_llm.ingest.files import InputFile, Reading, find_files
from ping_llm.progress import Progress, progress

RANGE_BYTES, AT_ONCE = 8 << 20, 4
ATTEMPTS, TIMEOUT_S = 6, 30.0
_BLOCK = 1 << 18
_BREAKS = (OSError, http.client.HTTPException)  # urllib's URLError is an OSError


@contextlib.contextmanager
def fetched(inputs: Sequence[str], reading: Reading) -> Iterator[list[InputFile]]:
    """Yields the files of `inputs`, as `find_files`; those that must be fetched exist meanwhile.

    Raises:
        DataError: As `find_files` does.
        StorageError: An input names nothing, or cannot be fetched.
    """
    with contextlib.ExitStack() as stack:
        urls: dict[str, str] = {}
        local = list(inputs)
        for i, url in enumerate(inputs):
            if url == "-" or url.startswith(("https://", "http://", "hf://")):
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="ping-llm-"))
                local[i] = str(_fetch(url, Path(temporary)))
                urls[local[i]] = "standard input" if url == "-" else _without_secrets(url)
        files = find_files(local, reading)
        yield [dataclasses.replace(file, url=_url_of(str(file.location), urls)) for file in files]


def _url_of(path: str, urls: dict[str, str]) -> str | None:
    for local, url in urls.items():
        if path == local or path.startswith(f"{local}/"):
            return url + path.removeprefix(local)
    return None


def _without_secrets(url: str) -> str:
    """Returns a URL without its user, password and query, in which credentials may stand."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _fetch(url: str, directory: Path) -> Path:
    """Fetches an input to a file in `directory`, or a directory there; tells its size and hash."""
    if url == "-":
        target, shown = directory / "stdin", "standard input"
        with open(target, "wb") as sink:
            shutil.copyfileobj(sys.stdin.buffer, sink, _BLOCK)
    elif url.startswith("hf://"):
        return _fetch_from_hub(url, directory)
    else:
        shown = _without_secrets(url)
        name = unquote(urlsplit(url).path).rpartition("/")[2]
        target = directory / (name if name.isprintable() and name.strip(".") else "index")
        _download(url, shown, target)
    with open(target, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = target.stat().st_size
    print(f"{shown}: {size:,} bytes, SHA-256 {digest}", file=sys.stderr, flush=True)
    return target


def _fetch_from_hub(url: str, directory: Path) -> Path:
    """Fetches what a URL of the hub names, with the credentials that its own tools find."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    hub, path = HfFileSystem(), url.removeprefix("hf://").rstrip("/")
    target = directory / path.rpartition("/")[2]
    try:
        found = sorted(hub.glob(path)) if any(c in path for c in "*?[") else [path]
        if not found:
            raise StorageError(f"{url}: no file there")
        for each in found:
            place = target if found == [path] else directory / each.rpartition("/")[2]
            hub.get(each, str(place), recursive=True)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StorageError(f"{url} cannot be fetched: {reason}") from None
    return target if found == [path] else directory


@dataclasses.dataclass(frozen=True)
class _Remote:
    """What a server says of a file: its size and version, and whether it takes ranges."""

    url: str
    size: int | None
    version: str
    takes_ranges: bool


def _download(url: str, shown: str, target: Path) -> None:
    remote = _retried(lambda: _ask(url), shown)
    with progress(f"fetch {target.name}", total=remote.size, unit="bytes") as bar:
        if remote.takes_ranges and remote.size is not None:
            _download_ranges(remote, shown, target, bar)
        else:
            _retried(lambda: _download_whole(remote, target, bar), shown)


def _ask(url: str) -> _Remote:
    with _opened(url, {"Range": "bytes=0-0"}) as answer:
        headers, is_part = answer.headers, answer.status == 206
        total = (headers.get("Content-Range") or "").rpartition("/")[2] if is_part else None
        size = total if is_part else headers.get("Content-Length")
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        known = int(size) if size and size.isdecimal() else None
        return _Remote(url, known, version, is_part)


def _download_ranges(remote: _Remote, shown: str, target: Path, bar: Progress) -> None:
    size, lock = remote.size or 0, threading.Lock()
    with open(target, "wb") as sink:
        sink.truncate(size)

        def fetch(start: int) -> None:
            at, stop = start, min(start + RANGE_BYTES, size)

            def more() -> None:
                nonlocal at
                with _opened(remote.url, {"Range": f"bytes={at}-{stop - 1}"}) as answer:
                    _check(answer, remote, at)
                    for block in _blocks(answer, stop - at):
                        with lock:
                            sink.seek(at)
                            sink.write(block)
                            bar.update(len(block))
                        at += len(block)

            _retried(more, shown)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for task in [pool.submit(fetch, start) for start in range(0, size, RANGE_BYTES)]:
                task.result()


def _check(answer: http.client.HTTPResponse, remote: _Remote, start: int) -> None:
    """Raises a `StorageError` where another file or another range came than the one begun with."""
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    place = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    if answer.status != 206 or version != remote.version or place != str(start):
        raise StorageError(
            f"{_without_secrets(remote.url)} changed while it was fetched; run the command again"
        )


def _download_whole(remote: _Remote, target: Path, bar: Progress) -> None:
    bar.update(done=0)
    with _opened(remote.url, {}) as answer, open(target, "wb") as sink:
        length = answer.headers.get("Content-Length")
        for block in _blocks(answer, int(length) if length else None):
            sink.write(block)
            bar.update(len(block))


def _opened(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    for name, value in {"User-Agent": "ping-llm", **headers}.items():
        request.add_header(name, value)
    if at:  # for this server alone, not for those that it redirects to
        encoded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _blocks(answer: BinaryIO | http.client.HTTPResponse, expected: int | None) -> Iterator[bytes]:
    """Yields what a server sends.

    Raises:
        EOFError: It is less than what was `expected`, in bytes.
    """
    received = 0
    while block := answer.read(_BLOCK if expected is None else min(_BLOCK, expected - received)):
        received += len(block)
        yield block
    if expected is not None and received < expected:
        raise http.client.IncompleteRead(b"", expected - received)


def _retried(work, shown: str):
    """Returns what `work` does, done again after a break, less and less often.

    Raises:
        StorageError: It broke too often, or the server refuses.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except urllib.error.HTTPError as error:
            error.close()
            if (error.code < 500 and error.code != 429) or attempt == ATTEMPTS:
                raise StorageError(
                    f"{shown} cannot be fetched: the server answers {error.code} {error.reason}"
                ) from None
        except (ValueError, *_BREAKS) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            if attempt == ATTEMPTS or isinstance(error, ValueError):
                raise StorageError(f"{shown} cannot be fetched: {reason}") from None
        time.sleep(0.2 * 2**attempt)
    raise AssertionError
