import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import emulators
import pytest

from ping_llm import outputs
from ping_llm.errors import ConfigError, PingLLMError, StorageError
from ping_llm.outputs import claim, publish_directory, publish_file, publish_json, publish_text
from ping_llm.storage import Location

BUCKETS = {"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, tmp_path_factory):
    """An object store; emulators are found through the environment."""
    emulator = {"s3": emulators.s3, "gs": emulators.gcs}[request.param]
    with (
        open(tmp_path_factory.mktemp("log") / "log", "wb") as log,
        emulator(log) as env,
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in env.items():
            patch.setenv(key, value)
        yield Location.of(BUCKETS[request.param])


@pytest.fixture
def remote(bucket, request):
    return bucket / request.node.name.partition("[")[0] / "out"


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return Location.of(tmp_path / "here")


@pytest.fixture
def private_temp(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@contextlib.contextmanager
def another_process(body, *arguments):
    """Yields a process that has run `body` up to a line it printed, and waits."""
    code = (
        "import sys, time\nfrom ping_llm import outputs\nfrom ping_llm.storage import Location\n"
        f"here = Location.of(sys.argv[1])\n{body}\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


HOLD = "with outputs.claim(here, what='train'):\n    print('ready', flush=True)\n    time.sleep(60)"
WRITE = (
    "with outputs.publish_file(here) as path:\n    path.write_text('half')\n"
    "    print('ready', flush=True)\n    time.sleep(60)"
)
FILL = (
    "with outputs.publish_directory(here, last='last') as path:\n    (path / 'a').write_text('x')\n"
    "    print('ready', flush=True)\n    time.sleep(60)"
)


# --- publishing ----------------------------------------------------------------------------------


def test_a_reader_sees_the_old_file_or_the_new_one_whole(here):
    file = here / "x.json"
    publish_json(file, {"old": 1})
    with publish_file(file) as path:
        path.write_text("new, half")
        assert json.loads(file.read_text()) == {"old": 1}
        path.write_text("new")
    assert file.read_text() == "new"
    assert here.names() == ["x.json"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_published_honours_the_umask_and_is_private_before(here, umask):
    before = os.umask(umask)
    try:
        publish_text(here / "file", "x")
        with publish_directory(here / "directory", last="a") as directory:
            (directory / "a").write_text("x")
            private = [p for p in directory.parents if p.parent == here.path]
            assert private[0].stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    modes = [(here / name).path.stat().st_mode & 0o777 for name in ("file", "directory")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_left_after_an_error_which_names_the_output(here, kind):
    publish = {
        "file": lambda: publish_file(here / "out"),
        "directory": lambda: publish_directory(here / "out", last="a"),
    }[kind]
    with pytest.raises(KeyError), publish():
        raise KeyError
    full = OSError(28, "No space left on device")
    message = r"here/out cannot be written: No space left on device; free some space"
    with pytest.raises(StorageError, match=message), publish():
        raise full
    assert here.names() == []


@pytest.mark.parametrize("body", [WRITE, FILL])
def test_what_a_killed_process_left_goes_with_the_next_publication(here, body):
    output = here / "out"
    with another_process(body, output) as process:
        assert [name for name in here.names() if not name.startswith(".")] == []
        process.kill()
        process.wait()
    if body == WRITE:
        publish_text(output, "whole")
    else:
        with publish_directory(output, last="last") as directory:
            (directory / "last").touch()
    assert here.names() == ["out"]


def test_what_a_living_process_writes_aside_is_left_to_it(here):
    with another_process(WRITE, here / "out"):
        (aside,) = here.names()
        publish_text(here / "out", "whole")
        assert here.names() == [aside, "out"]


def test_names_are_unpredictable_and_links_planted_in_their_place_are_not_followed(
    remote, private_temp, tmp_path
):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    seen = set()
    for _ in range(2):
        with publish_file(remote) as path:
            path.write_text("x")
            (workplace,) = private_temp.iterdir()
            seen.add(workplace.name)
    assert len(seen) == 2
    planted = private_temp / (workplace.name[:-8] + "12345678")
    planted.symlink_to(tmp_path / "victim")
    publish_text(remote, "y")
    assert [p.name for p in (tmp_path / "victim").iterdir()] == ["file"]
    assert planted.is_symlink()


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(here, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (here / "out").path.symlink_to(tmp_path / "victim")
    publish_text(here / "out", "x")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (here / "out").read_text() == "x"


def test_content_is_on_the_disk_before_the_move_and_the_move_after_it(here, monkeypatch):
    events, sync = [], os.fsync

    def synced(file):
        sync(file)
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    for name in ("replace", "rename"):
        move = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *pair, move=move: [move(*pair), events.append("move")])
    monkeypatch.setattr(os, "fsync", synced)
    publish_text(here / "file", "x")
    assert events == ["file", "move", "here"]
    events.clear()
    fill(here / "directory", ["last"])
    assert events == ["last", "content", "move", "here"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_not_replaced_by_one(here, make):
    make((here / "out").path)
    with pytest.raises(ConfigError, match="out exists and is not a file"):
        publish_text(here / "out", "x")


def fill(location, names, *, last="last"):
    with publish_directory(location, last=last) as directory:
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(name)


def test_a_new_directory_appears_in_one_move(here):
    output = here / "new" / "out"
    with publish_directory(output, last="last") as directory:
        (directory / "last").touch()
        assert not output.exists()
    assert output.names() == ["last"]
    assert output.parent.names() == ["out"]


def test_a_mount_point_stays_itself_and_is_filled_from_within(here, monkeypatch):
    """There is no renaming onto one, nor into it from beside it, where nobody may even write."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == (here / "out").path)
    output = here / "out"
    (output / "lost+found").path.mkdir(parents=True)
    (output / ".hidden").path.touch()
    output.path.chmod(0o750)
    before = output.path.stat()
    with claim(output, what="prepare-data"), publish_directory(output, last="a") as directory:
        assert here.names() == ["out"]
        assert output.path in directory.parents
        with pytest.raises(ConfigError, match="prepare-data, pid"):
            claim(output, what="prepare-data").__enter__()
        (directory / "b").mkdir()
        for name in ("a", "b/c"):
            (directory / name).touch()
    assert output.names() == [".hidden", "a", "b", "lost+found"]
    after = output.path.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_an_output_that_is_not_empty_is_refused_before_the_work(here):
    fill(here / "out", ["last"])
    publish_text(here / "file", "x")
    with (
        pytest.raises(ConfigError, match="out exists and is not empty; choose another output"),
        publish_directory(here / "out", last="last"),
    ):
        pytest.fail("the work was begun")
    with (
        pytest.raises(ConfigError, match="file exists and is not a directory; choose another"),
        publish_directory(here / "file", last="last"),
    ):
        pytest.fail("the work was begun")


def uploads(monkeypatch, *, most=100):
    """Returns the names that are uploaded or moved from now on; the one after `most` fails."""
    done, upload, rename = [], Location.upload, os.rename

    def note(name):
        if len(done) == most:
            raise OSError("cut off")
        done.append(name)

    def uploaded(self, local):
        if self.name != outputs.UNFINISHED:
            note(self.name)
        upload(self, local)

    def renamed(source, target):
        note(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(Location, "upload", uploaded)
    monkeypatch.setattr(os, "rename", renamed)
    return done


def check_filling(output, monkeypatch):
    with monkeypatch.context() as patch:
        done = uploads(patch, most=2)
        with pytest.raises(StorageError, match="cannot be written: cut off"):
            fill(output, ["last", "a", "z"])
        assert done == ["a", "z"]
    with monkeypatch.context() as patch:
        done = uploads(patch)
        fill(output, ["last", "b", "z"])
        assert done == ["b", "z", "last"]
    assert output.names() == ["b", "last", "z"]
    assert (output / "z").read_text() == "z"
    publish_text(output / outputs.UNFINISHED, "b\nlast\nz\n")  # as of one killed at its very end
    with pytest.raises(ConfigError, match="is not empty"):
        fill(output, ["last", "b", "z"])


def test_an_existing_directory_is_filled_with_the_last_name_last_and_again_when_cut_short(
    here, monkeypatch
):
    check_filling(here, monkeypatch)


def test_an_object_store_is_filled_with_the_last_name_last_and_again_when_cut_short(
    remote, monkeypatch
):
    check_filling(remote, monkeypatch)


def test_directories_below_are_uploaded_too(remote, private_temp):
    fill(remote, ["last", "below/a"])
    assert (remote / "below" / "a").read_text() == "below/a"
    assert list(private_temp.iterdir()) == []


def test_other_files_in_an_object_store_are_refused_before_the_work(remote):
    publish_text(remote / "thesis.tex", "precious")
    with (
        pytest.raises(ConfigError, match="exists and is not empty"),
        publish_directory(remote, last="last"),
    ):
        pytest.fail("the work was begun")


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["absent", "file", "directory"])
def test_a_second_process_is_refused_in_one_line_that_names_the_first(here, kind):
    output = here / "out"
    if kind == "file":
        output.path.touch()
    if kind == "directory":
        output.path.mkdir()
    before = here.names()
    with another_process(HOLD, output) as process:
        with pytest.raises(ConfigError) as caught, claim(output, what="train"):
            pytest.fail("claimed twice")
        message = str(caught.value)
        assert message.startswith(f"{output} is being written by another process (train, pid ")
        assert f"pid {process.pid} on {os.uname().nodename}, since 20" in message
        assert message.endswith("); let it finish or choose another output")
        assert message.isprintable()
        process.kill()
        process.wait()
    with claim(output, what="train"):  # at once
        assert kind == "file" or output.names() == []
    assert here.names() == before


def test_a_second_thread_and_a_second_claim_of_one_process_are_refused(here):
    refused = []

    def try_it():
        try:
            with claim(here / "out", what="train"):
                pass
        except ConfigError as error:
            refused.append(error)

    with claim(here / "out", what="train"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        try_it()
    assert len(refused) == 2
    try_it()
    assert len(refused) == 2


def test_a_claim_does_not_live_on_in_a_fork_of_a_killed_process(here):
    body = (
        "import os\nwith outputs.claim(here, what='train'):\n    child = os.fork()\n"
        "    time.sleep(0.3) if child else time.sleep(8) or os._exit(0)\n"
        "    print('ready', flush=True)\n    time.sleep(60)"
    )
    with another_process(body, here / "out") as process:
        process.kill()
        process.wait()
        with claim(here / "out", what="train"):
            pass


def test_only_one_of_many_threads_holds_a_claim_at_a_time(here):
    inside, most, taken = [], [], []

    def try_it():
        for _ in range(40):
            with contextlib.suppress(ConfigError), claim(here / "out", what="train"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
                taken.append(1)

    threads = [threading.Thread(target=try_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(taken) > 1
    assert here.names() == []


def test_what_shares_an_output_shares_its_claim_and_refuses_what_does_not(here):
    output = here / "store"
    with claim(output, what="extract-activations", shared=True):
        with claim(output, what="extract-activations", shared=True):
            pass
        with pytest.raises(ConfigError, match="extract-activations"), claim(output, what="train"):
            pytest.fail("claimed")
    with claim(output, what="train"), pytest.raises(ConfigError, match="train, pid"):
        claim(output, what="extract-activations", shared=True).__enter__()
    assert here.names() == []


def test_a_directory_and_a_link_to_it_are_one_output(here):
    (here / "run").path.mkdir()
    (here / "link").path.symlink_to("run")
    with (
        claim(here / "run", what="train"),
        pytest.raises(ConfigError, match="link is being written"),
        claim(here / "link", what="train"),
    ):
        pytest.fail("claimed twice")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_planted_in_the_place_of_a_lock_is_not_written_through(here, tmp_path, link):
    (tmp_path / "victim").write_text("precious")
    link(tmp_path / "victim", (here / ".out.lock").path)
    with pytest.raises(StorageError, match="out cannot be written"), claim(here / "out", what="x"):
        pytest.fail("claimed")
    assert (tmp_path / "victim").read_text() == "precious"


def test_what_a_lock_file_says_cannot_control_a_terminal(here):
    with claim(here / "out", what="train"):
        (here / ".out.lock").path.write_bytes(b"\x1b[2J\xff\n")
        with pytest.raises(ConfigError, match=r"\(\\x1b\[2J") as caught:
            claim(here / "out", what="train").__enter__()
    assert str(caught.value).isprintable()


def test_other_settings_than_the_stored_ones_are_refused_and_the_claim_is_free_again(here):
    output = here / "run"
    with (
        pytest.raises(ConfigError, match="begun with other settings: seed=1, was 0"),
        claim(output, what="train", settings={"seed": 1}, stored=lambda: {"seed": 0}),
    ):
        pytest.fail("claimed")
    with claim(output, what="train", settings={"seed": 1}, stored=lambda: None):
        pass
    assert here.names() == []


def test_a_claim_in_an_object_store_refuses_others_and_is_gone_after_it(remote):
    with claim(remote, what="train") as held:
        with pytest.raises(ConfigError) as caught, claim(remote, what="train"):
            pytest.fail("claimed twice")
        message = str(caught.value)
        assert message.startswith(f"{remote} is being written by another process (train, pid ")
        assert message.endswith("; if that was killed, its claim runs out in 60 s")
        with pytest.raises(ConfigError, match="train, pid"):
            claim(remote, what="extract-activations", shared=True).__enter__()
        publish_text(remote / "config.json", "{}", claim=held)
        assert remote.names() == ["config.json"]
    assert remote.parent.names() == ["out"]
    with claim(remote, what="extract-activations", shared=True) as held:
        held.check()


def test_a_claim_in_an_object_store_is_renewed_while_its_process_lives_and_then_runs_out(
    remote, monkeypatch
):
    monkeypatch.setattr(outputs, "LEASE_S", 1.2)
    body = "outputs.LEASE_S = 1.2\n" + HOLD
    with another_process(body, remote) as process:
        until = time.monotonic() + 1.6
        while time.monotonic() < until:
            with pytest.raises(ConfigError), claim(remote, what="train"):
                pytest.fail("claimed twice")
            time.sleep(0.1)
        process.kill()
        process.wait()
    killed, claimed = time.monotonic(), False
    while not claimed:
        assert time.monotonic() - killed < 2.0
        with contextlib.suppress(ConfigError), claim(remote, what="train"):
            claimed = True
    assert remote.parent.names() == []


def test_who_lost_a_claim_while_suspended_publishes_nothing_more(remote, tmp_path):
    body = (
        "outputs.LEASE_S = 0.6\n"
        "from ping_llm.errors import StorageError\n"
        "with outputs.claim(here, what='train') as held:\n    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n    try:\n"
        "        outputs.publish_text(here / 'x', 'late', claim=held)\n"
        "    except StorageError as error:\n        print(error, flush=True)\n"
    )
    code = (
        "import sys\nfrom ping_llm import outputs\nfrom ping_llm.storage import Location\n"
        f"here = Location.of(sys.argv[1])\n{body}"
    )
    command = [sys.executable, "-c", code, str(remote)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        with claim(remote, what="train"):
            process.send_signal(signal.SIGCONT)
            message, _ = process.communicate("go on\n", timeout=20)
            publish_text(remote / "x", "ours")
        assert f"{remote} was taken over by another process" in message
        assert process.returncode == 0
    assert (remote / "x").read_text() == "ours"


def test_who_was_suspended_and_lost_nothing_goes_on(remote, monkeypatch):
    with claim(remote, what="train") as held:
        late = time.time() + 100
        monkeypatch.setattr(time, "time", lambda: late)
        publish_text(remote / "x", "late", claim=held)
    assert (remote / "x").read_text() == "late"


def test_what_is_no_lease_does_not_block(remote):
    publish_text(remote.parent / ".out.lock", "not a lease")
    with claim(remote, what="train"):
        pass
    assert remote.parent.names() == []


# --- content -------------------------------------------------------------------------------------


def test_a_digest_is_of_all_the_content(here, remote):
    content = os.urandom(9_000_000)
    (here / "a").path.write_bytes(content)
    (remote / "a").upload((here / "a").path)
    for location in (here, remote):
        ((name, size, sha256),) = outputs.digest_files(location.find())
        assert (name, size, sha256) == ("a", len(content), hashlib.sha256(content).hexdigest())
    assert outputs.content_fingerprint(here) == outputs.content_fingerprint(remote)
    changed = bytearray(content)
    changed[4_321_000] ^= 1
    before = outputs.content_fingerprint(here)
    (here / "a").path.write_bytes(changed)
    assert outputs.content_fingerprint(here) != before


def test_a_fingerprint_knows_names_and_content_and_no_order():
    files = [("a", 1, "aa"), ("b", 2, "bb")]
    assert outputs.fingerprint(files) == outputs.fingerprint(files[::-1])
    others = [files[:1], [("a", 1, "bb"), ("b", 2, "aa")], [("c", 1, "aa"), files[1]]]
    assert len({outputs.fingerprint(each) for each in (files, *others)}) == 4


def test_a_file_that_is_absent_is_named(here):
    with pytest.raises(PingLLMError, match="none does not exist"):
        outputs.content_fingerprint(here / "none")
