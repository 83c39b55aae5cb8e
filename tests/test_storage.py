import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulators
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ping_llm import storage
from ping_llm.errors import DataError, StorageError
from ping_llm.storage import Location

BUCKETS = {"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}


@pytest.fixture(scope="module", params=["file", "s3", "gs"])
def root(request, tmp_path_factory):
    """A place to write below, of each kind; emulators are found through the environment."""
    place = tmp_path_factory.mktemp("storage")
    if request.param == "file":
        yield str(place / "root")
        return
    emulator = {"s3": emulators.s3, "gs": emulators.gcs}[request.param]
    with (
        open(place / "log", "wb") as log,
        emulator(log) as env,
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in env.items():
            patch.setenv(key, value)
        yield f"{BUCKETS[request.param]}/root"


@pytest.fixture
def upload(root, tmp_path):
    def upload(name, **files):
        local = tmp_path / name
        local.mkdir()
        location = Location.of(root) / name
        if location.is_local:
            os.makedirs(location.path)
        for key, content in files.items():
            path = local / key.replace("_", ".")
            path.write_bytes(content)
            (location / path.name).upload(path)
        return location

    return upload


def test_what_was_written_is_found_with_its_size_and_read_back(upload):
    content = os.urandom(3_000_000)
    location = upload("bulk", done_json=b"{}", a_arrow=content)
    found = {f.location.name: f.size for f in location.find()}
    assert found == {"a.arrow": len(content), "done.json": 2}
    assert (location / "a.arrow").read_bytes() == content
    assert (location / "a.arrow").size() == len(content)
    assert (location / "done.json").read_text() == "{}"


def test_a_file_can_be_read_from_its_end_as_parquet_is(upload):
    location = upload("range", a_bin=bytes(range(256)))
    with (location / "a.bin").open_input() as file:
        file.seek(-6, 2)
        assert file.read(4) == bytes([250, 251, 252, 253])


def test_bytes_that_are_not_text_are_an_error_that_names_the_file(upload):
    location = upload("text", a_txt=b"caf\xe9")
    with pytest.raises(DataError, match=r"text/a\.txt cannot be read as UTF-8"):
        (location / "a.txt").read_text()


def test_globs_match_as_in_a_shell(upload, root):
    upload("globs", a_csv=b"1", b_csv=b"2", c_txt=b"3")
    found = Location.of(f"{root}/glo*/[ab].csv").find()
    assert [f.location.name for f in found] == ["a.csv", "b.csv"]
    with pytest.raises(StorageError, match="no file there"):
        Location.of(f"{root}/*/none*.csv").find()


def test_hidden_files_are_not_part_of_a_directory_but_among_its_names(upload):
    location = upload("hidden", seen_csv=b"1", _csv=b"2")
    assert [f.location for f in location.find()] == [location / "seen.csv"]
    assert location.names() == [".csv", "seen.csv"]


def test_a_location_says_what_is_there(upload, root):
    location = upload("there", a_csv=b"1")
    file, absent = location / "a.csv", location / "b.csv"
    assert (file.is_file(), file.is_dir(), file.exists()) == (True, False, True)
    assert (location.is_file(), location.is_dir(), location.exists()) == (False, True, True)
    assert (absent.is_file(), absent.is_dir(), absent.exists()) == (False, False, False)
    assert absent.names() == []
    with pytest.raises(StorageError, match=r"b\.csv: there is no file of that name"):
        absent.size()


def test_what_is_removed_is_gone_and_nothing_else(upload):
    location = upload("removed", a_csv=b"1", b_csv=b"2")
    beside = upload("removed2", a_csv=b"3")
    (location / "a.csv").remove()
    (location / "a.csv").remove()
    assert location.names() == ["b.csv"]
    location.remove()
    assert not location.exists()
    assert beside.names() == ["a.csv"]


def test_what_is_absent_is_an_error_that_names_it(root):
    for call in (Location.find, Location.open_input):
        with pytest.raises(StorageError, match="none/at-all"):
            call(Location.of(f"{root}/none/at-all"))


def test_a_local_directory_is_used_as_it_is(tmp_path):
    assert Location.of(tmp_path).local_copy(identity="x") == tmp_path


def test_a_remote_directory_is_copied_once_and_again_when_it_changes(
    upload, root, tmp_path, monkeypatch
):
    if Location.of(root).is_local:
        pytest.skip("only remote directories are copied")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    location = upload("rows", a_arrow=b"first", dataset_json=b"1")
    (location / "below" / "b.arrow").upload(tmp_path / "rows" / "a.arrow")
    whole = location.local_copy()  # by names, sizes and times
    first = location.local_copy(identity="dataset.json")
    assert (first / "a.arrow").read_bytes() == b"first"
    assert (first / "below" / "b.arrow").read_bytes() == b"first"
    assert location.local_copy(identity="dataset.json") == first
    (tmp_path / "rows" / "dataset.json").write_bytes(b"22")
    (location / "dataset.json").upload(tmp_path / "rows" / "dataset.json")
    assert location.local_copy(identity="dataset.json") != first
    again = location.local_copy()
    assert again != whole
    assert (again / "dataset.json").read_bytes() == b"22"
    assert location.local_copy() == again


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/file", "unknown scheme; expected a local path, gs:// or s3://"),
        (Path("gs://bucket/x"), "unknown scheme"),
        ("s3://", "no bucket"),
        ("gs:///x", "no bucket"),
        ("gs://anonymous@/x", "no bucket"),
        ("", "is no path"),
        ("a\0b", "is no path"),
        ("/no/such/file", "does not exist"),
        ("/no/such/*.csv", "no file there"),
    ],
)
def test_a_url_that_cannot_be_says_why(url, message):
    with pytest.raises(StorageError, match=message):
        Location.of(url).find()


@pytest.mark.parametrize("text", ["a/b", "/a/b", "./data:/b", "s3://bucket/a/b", "gs://u@k/a//b"])
def test_a_location_is_its_text_and_joins_and_splits_like_one(text):
    location = Location.of(text)
    assert str(location) == text
    assert location == Location.of(location) == Location.of(text + "/")
    assert location.name == "b"
    assert location / "c" == Location.of(text + "/c")
    assert (location / "c").parent == location
    assert len({location, Location.of(text)}) == 1


def test_the_top_is_its_own_parent():
    for top in ("/", "s3://bucket"):
        assert Location.of(top).parent == Location.of(top)
        assert (Location.of(top) / "x").parent == Location.of(top)
    assert Location.of("x").parent == Location.of(".")


def test_only_a_local_location_has_a_path():
    assert Location.of("a/b").path == Path("a/b")
    with pytest.raises(StorageError, match="s3://bucket/a is remote"):
        _ = Location.of("s3://bucket/a").path


@given(st.text(max_size=8) | st.sampled_from(["..", ".", "a/b", "/etc", "..\\x", "\x1b[2J", "\0"]))
@example("../../../etc/passwd")
def test_a_name_from_a_file_is_refused_or_stays_right_below(name):
    for text in ("/base/here", "s3://bucket/here"):
        location, child = Location.of(text), None
        with contextlib.suppress(StorageError):
            child = location.child(name)
        if child is not None:
            assert os.path.normpath(str(child)) == os.path.normpath(f"{text}/{name}")
            assert child.parent == location
            assert child.name == name


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "a\\b", "a\nb", "\ud800", None, 7])
def test_names_that_leave_a_directory_are_refused(name):
    with pytest.raises(StorageError, match="is not the name of a file there") as caught:
        Location.of("/base").child(name)
    assert str(caught.value).isprintable()


def test_an_upload_that_a_signal_interrupts_still_leaves_a_whole_object(
    root, tmp_path, monkeypatch
):
    if Location.of(root).is_local:
        pytest.skip("only object stores take uploads")
    (tmp_path / "big").write_bytes(os.urandom(20_000_000))
    location = Location.of(root) / "interrupted"
    copy, main = storage.shutil.copyfileobj, threading.get_ident()

    def interrupted(*args):
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        copy(*args)

    monkeypatch.setattr(storage.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        location.upload(tmp_path / "big")
    assert location.read_bytes() == (tmp_path / "big").read_bytes()


@pytest.fixture
def pairs(root, request):
    return (Location.of(root) / f"kv-{request.node.name.partition('[')[0]}").kv()


def test_a_value_is_read_back_and_an_absent_one_is_none(pairs):
    pairs.write("a/b", b"1")
    assert pairs.read("a/b")[0] == b"1"
    assert pairs.read("a/c")[0] is None


def test_only_one_creates_a_value(pairs):
    assert pairs.create("done.json", b"first")
    assert not pairs.create("done.json", b"second")
    assert pairs.read("done.json")[0] == b"first"


def test_only_one_of_many_threads_creates_each_value(pairs):
    with ThreadPoolExecutor(8) as pool:
        for key in map(str, range(5)):
            values = [bytes([i]) for i in range(8)]
            won = list(pool.map(lambda value, key=key: pairs.create(key, value), values))
            assert won.count(True) == 1
            assert pairs.read(key)[0] == values[won.index(True)]


def test_a_value_is_swapped_only_by_who_saw_the_newest(pairs):
    pairs.write("claim", b"a")
    _, seen = pairs.read("claim")
    newer = pairs.swap("claim", b"b", seen)
    assert newer
    assert pairs.swap("claim", b"c", seen) is None
    assert pairs.swap("claim", b"d", newer)
    assert pairs.read("claim")[0] == b"d"


def test_a_value_is_removed_only_by_who_saw_the_newest(pairs):
    pairs.write("claim", b"a")
    _, seen = pairs.read("claim")
    newer = pairs.swap("claim", b"b", seen)
    pairs.remove("claim", seen)
    assert pairs.read("claim")[0] == b"b"
    pairs.remove("claim", newer)
    assert pairs.read("claim")[0] is None


def test_keys_are_listed_and_deleted_by_their_beginning(pairs):
    for key in ("units/2/done.json", "units/1/x/a", "units/1/x/b", "other"):
        pairs.write(key, b"")
    assert pairs.keys("units/") == ["units/1/x/a", "units/1/x/b", "units/2/done.json"]
    pairs.delete("units/1/")
    assert pairs.keys("") == ["other", "units/2/done.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    pairs = storage.KeyValueStore(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="file/below/key cannot be written"):
        pairs.write("key", b"")


@pytest.mark.parametrize("there", [None, b"before"])
def test_what_a_killed_writer_left_is_not_part_of_the_next_value(there, tmp_path):
    pairs = storage.KeyValueStore(tmp_path)
    if there is not None:
        pairs.write("done.json", there)
    (tmp_path / "done.json.__lock").write_bytes(b"a longer value, half writ")
    _, generation = pairs.read("done.json")
    assert pairs.swap("done.json", b"short", generation)
    assert pairs.read("done.json")[0] == b"short"
    (tmp_path / "other.__lock").write_bytes(b"a longer value, half writ")
    pairs.write("other", b"short")
    assert pairs.read("other")[0] == b"short"


def test_many_writers_of_one_value_never_spoil_it(tmp_path):
    pairs = storage.KeyValueStore(tmp_path)
    pairs.write("claim", b"0" * 50)

    def write(seed):
        for step in range(60):
            value, generation = pairs.read("claim")
            assert value in {bytes([48 + i]) * 50 for i in range(9)}
            pairs.swap("claim", bytes([48 + (seed + step) % 9]) * 50, generation)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))


def test_a_path_that_is_not_utf8_is_refused_in_one_line():
    with pytest.raises(StorageError, match="not UTF-8; rename it"):
        Location.of(os.fsdecode(b"b\xff/x.parquet"))


def unused_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_is_not_there_is_one_error_at_once(monkeypatch, scheme):
    port = unused_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
    location = Location.of(f"{scheme}://bucket/x")
    for use in (location.is_file, location.names, location.find, location.kv):
        with pytest.raises(StorageError, match=f"http://127.0.0.1:{port} cannot be reached"):
            use()


def test_a_store_that_does_not_answer_is_said_while_one_waits(monkeypatch, capfd):
    monkeypatch.setattr(storage, "NOTICE_S", 0.05)
    for url in ("s3://bucket/x", "/local/x"):
        with storage._operation(Location.of(url), "read"):
            time.sleep(0.2)
    assert capfd.readouterr().err == "still waiting for s3://bucket/x: the store does not answer\n"
