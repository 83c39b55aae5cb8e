import os
from concurrent.futures import ThreadPoolExecutor

import emulators
import pytest

from ping_llm import storage
from ping_llm.errors import StorageError

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
        for key, content in files.items():
            (local / key.replace("_", ".")).write_bytes(content)
        url = storage.join(root, name)
        if not storage.is_remote(url):
            os.makedirs(url)
        storage.upload_directory(local, url, last=next(iter(files)).replace("_", "."))
        return url

    return upload


def test_what_was_written_is_found_with_its_size_and_read_back(upload):
    content = os.urandom(3_000_000)
    url = upload("bulk", done_json=b"{}", a_arrow=content)
    found = {f.url.rpartition("/")[2]: f.size for f in storage.find(url)}
    assert found == {"a.arrow": len(content), "done.json": 2}
    with storage.open_input(storage.join(url, "a.arrow")) as file:
        assert file.read() == content


def test_a_file_can_be_read_from_its_end_as_parquet_is(upload):
    url = upload("range", a_bin=bytes(range(256)))
    with storage.open_input(storage.join(url, "a.bin")) as file:
        file.seek(-6, 2)
        assert file.read(4) == bytes([250, 251, 252, 253])


def test_globs_match_as_in_a_shell(upload, root):
    upload("globs", a_csv=b"1", b_csv=b"2", c_txt=b"3")
    found = storage.find(f"{root}/glo*/[ab].csv")
    assert [f.url.rpartition("/")[2] for f in found] == ["a.csv", "b.csv"]
    with pytest.raises(StorageError, match="no file there"):
        storage.find(f"{root}/*/none*.csv")


def test_hidden_files_are_not_part_of_a_directory(upload):
    url = upload("hidden", seen_csv=b"1")
    names = [f.url for f in storage.find(url)]
    assert names == [storage.join(url, "seen.csv")]


def test_exists_says_whether_a_file_is_there(upload):
    url = upload("there", a_csv=b"1")
    assert storage.exists(storage.join(url, "a.csv"))
    assert not storage.exists(storage.join(url, "b.csv"))


def test_what_is_absent_is_an_error_that_names_it(root):
    for call in (storage.find, storage.open_input):
        with pytest.raises(StorageError, match="none/at-all"):
            call(f"{root}/none/at-all")


def test_a_local_directory_is_used_as_it_is(tmp_path):
    assert storage.local_directory(tmp_path, identity="x") == tmp_path


def test_a_remote_directory_is_copied_once_and_again_when_it_changes(
    upload, root, tmp_path, monkeypatch
):
    if not storage.is_remote(root):
        pytest.skip("only remote directories are copied")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = upload("rows", dataset_json=b"1", a_arrow=b"first")
    first = storage.local_directory(url, identity="dataset.json")
    assert (first / "a.arrow").read_bytes() == b"first"
    assert storage.local_directory(url, identity="dataset.json") == first
    (tmp_path / "rows" / "dataset.json").write_bytes(b"2")
    storage.upload_directory(tmp_path / "rows", url, last="dataset.json")
    assert storage.local_directory(url, identity="dataset.json") != first


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/file", "unknown scheme"),
        ("s3://", "no bucket"),
        ("gs:///x", "no bucket"),
        ("/no/such/file", "does not exist"),
        ("/no/such/*.csv", "no file there"),
    ],
)
def test_a_url_that_cannot_be_says_why(url, message):
    with pytest.raises(StorageError, match=message):
        storage.find(url)


@pytest.fixture
def pairs(root, request):
    return storage.KeyValueStore(storage.join(root, f"kv-{request.node.name.partition('[')[0]}"))


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
