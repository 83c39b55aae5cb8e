import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hf_checkpoints import make_checkpoint
from stores import assert_equal_stores, everything

from ping_llm.activations import store
from ping_llm.activations.arrays import ShardedArray, open_array
from ping_llm.activations.inspection import inspect_activations
from ping_llm.activations.reader import ActivationReader
from ping_llm.activations.statistics import unit_statistics
from ping_llm.errors import CheckpointError, ConfigError, DataError, StorageError
from ping_llm.extraction import parity
from ping_llm.extraction.run import extract_activations
from ping_llm.ingest.prepare import prepare_data
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import KeyValueStore, Location


def test_every_row_is_what_transformers_gives_for_its_prompt_alone(finished, checkpoint, documents):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    lines = [json.loads(line) for line in documents.read_text(encoding="utf-8").splitlines()]
    prompts = [np.array(tokenizer(line["text"])["input_ids"], np.int64) for line in lines]
    expected = parity.reference_activations(checkpoint, [p for p in prompts if len(p)])
    arrays, rows = everything(finished)
    np.testing.assert_array_equal(rows.tokens, np.concatenate(prompts))
    np.testing.assert_array_equal(
        rows.positions, np.concatenate([np.arange(len(p)) for p in prompts])
    )
    ids = [line["id"] for line, p in zip(lines, prompts, strict=True) for _ in p]
    assert rows.samples == ids
    for name, key in {"residual.00002": ("residual", 2), "embed": ("embed", 0)}.items():
        theirs = np.concatenate([prompt[key] for prompt in expected])
        assert parity.relative_l2(arrays[name], theirs) < 1e-5


def test_a_finished_store_is_left_as_it_is_and_gives_the_same_result(
    finished, checkpoint, documents, small
):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    first = extract_activations(checkpoint, documents, finished, **small)
    assert first == extract_activations(checkpoint, documents, finished, **small)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert first.units_done == first.units > 2
    assert first.empty > 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"layers": "1"}, r"layers=\[1\], was \[0, 2\]"),
        ({"max_length": 200}, "max_length=200, was 128"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16', was 'float32'"),
        ({"limit": 5}, "limit=5, was None"),
        ({"batch_tokens": 512}, "batch_tokens=512, was 256"),
        ({"lease_seconds": 3.0}, "lease_seconds=3.0, was 2.0"),
    ],
)
def test_other_settings_are_refused_by_their_names(
    change, name, finished, checkpoint, documents, small
):
    with pytest.raises(ConfigError, match=name):
        extract_activations(checkpoint, documents, finished, **small | change)


def test_another_model_and_another_input_are_refused(
    finished, checkpoint, documents, small, tmp_path
):
    changed = tmp_path / documents.name
    changed.write_bytes(documents.read_bytes().replace(b"dog", b"cat"))
    with pytest.raises(ConfigError, match="input files="):
        extract_activations(checkpoint, changed, finished, **small)
    other = make_checkpoint(tmp_path / "other", rms_norm_eps=1e-5)
    with pytest.raises(ConfigError, match="model config="):
        extract_activations(other, documents, finished, **small | {"format": "tokens"})


@pytest.mark.parametrize("positions", ["last", "every-5"])
def test_only_the_tokens_asked_for_are_stored(
    positions, finished, checkpoint, documents, small, tmp_path
):
    settings = small | {"positions": positions, "sites": "residual,embed"}
    said = extract_activations(checkpoint, documents, tmp_path / "s", dry_run=True, **settings)
    done = extract_activations(checkpoint, documents, tmp_path / "s", **settings)
    whole, rows = everything(finished)
    if positions == "last":
        kept = np.append(np.array(rows.samples[:-1]) != np.array(rows.samples[1:]), True)
    else:
        kept = rows.positions % 5 == 0
    assert said.tokens == done.tokens == kept.sum()
    assert said.padding_fraction == pytest.approx(done.padding_fraction)
    arrays, stored = everything(tmp_path / "s")
    for name in ("tokens", "positions", "roles"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(rows, name)[kept])
    assert stored.samples == np.array(rows.samples)[kept].tolist()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, whole[name][kept])
    found = inspect_activations(str(tmp_path / "s"), verify=True)
    assert found.errors == []
    norms = np.linalg.norm(arrays["residual.00002"], axis=1)
    assert found.statistics["residual.00002"]["norm_mean"] == pytest.approx(norms.mean(), rel=1e-5)
    kv = KeyValueStore(tmp_path / "s")
    first = store.read_done(kv, 0)
    mean = np.asarray(open_array(kv, first, "means").read().result())[1]
    np.testing.assert_allclose(mean, arrays["residual.00000"][: first["tokens"]].mean(0), atol=1e-5)


def test_sites_of_other_widths_are_stored_as_transformers_has_them(
    checkpoint, documents, small, tmp_path
):
    widths = {"k": 16, "heads": 32, "mlp_inner": 48}
    settings = small | {"sites": "k,heads,mlp_inner", "limit": 8}
    extract_activations(checkpoint, documents, tmp_path / "s", **settings)
    arrays, rows = everything(tmp_path / "s")
    changes = np.flatnonzero(np.array(rows.samples[:-1]) != np.array(rows.samples[1:])) + 1
    expected = parity.reference_activations(checkpoint, np.split(rows.tokens, changes))
    for name, values in arrays.items():
        site, _, layer = name.partition(".")
        theirs = np.concatenate([prompt[site, int(layer)] for prompt in expected])
        assert values.shape == (len(rows.tokens), widths[site])
        assert parity.relative_l2(values, theirs) < 1e-5
    assert inspect_activations(str(tmp_path / "s"), verify=True).errors == []


@pytest.mark.parametrize("positions", ["first", "every-0", "every-", "every--2", "every-1.5"])
def test_positions_that_cannot_be_are_refused(positions, checkpoint, documents, tmp_path):
    with pytest.raises(ConfigError, match="expected all, last, or every-"):
        extract_activations(checkpoint, documents, tmp_path / "s", positions=positions)


def test_a_start_that_failed_before_anything_was_published_does_not_block_the_next_one(
    checkpoint, documents, small, tmp_path
):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"words": "the cat"}\n')
    with pytest.raises(DataError, match="no string `text`"):
        extract_activations(checkpoint, wrong, tmp_path / "s", **small)
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        extract_activations(cut, documents, tmp_path / "s", **small)
    extract_activations(checkpoint, documents, tmp_path / "s", **small | {"limit": 3})
    with pytest.raises(ConfigError, match="limit=4, was 3"):
        extract_activations(checkpoint, documents, tmp_path / "s", **small | {"limit": 4})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_narrow_dtypes_are_the_float32_values_rounded_once(
    dtype, compression, finished, checkpoint, documents, small, tmp_path
):
    settings = small | {"dtype": dtype, "compression": compression, "sites": "residual"}
    extract_activations(checkpoint, documents, tmp_path / "s", **settings)
    exact = ActivationReader(str(finished), layer=2)
    rounded = ActivationReader(str(tmp_path / "s"), layer=2)
    assert rounded.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    np.testing.assert_array_equal(rounded[:], exact[:].astype(rounded.dtype))
    assert inspect_activations(str(tmp_path / "s"), verify=True).errors == []


def test_a_value_that_does_not_fit_float16_is_an_error_that_names_it(
    checkpoint, documents, small, tmp_path
):
    from safetensors.numpy import load_file, save_file

    big = tmp_path / "big"
    big.mkdir()
    for path in checkpoint.iterdir():
        (big / path.name).write_bytes(path.read_bytes())
    tensors = load_file(big / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * 1e6}, big / "model.safetensors")
    settings = small | {"dtype": "float16"}
    with pytest.raises(DataError, match=r"residual\.00000 of sample doc.*float16"):
        extract_activations(big, documents, tmp_path / "s", **settings)
    # Units come in a random order; one whose values fit may have been published before.
    kv = KeyValueStore(tmp_path / "s")
    units = len(store.open_manifest(kv)["units"])
    done = store.read_all_done(kv, units)
    assert len(done) < units
    found = {tuple(key.split("/")[1:3]) for key in kv.keys("units/")}
    attempts = {(f"{unit:05d}", entry["attempt"]) for unit, entry in done.items()}
    assert {pair for pair in found if pair[1] != "done.json"} == attempts


def test_what_a_dry_run_says_is_what_happens(finished, checkpoint, documents, small, tmp_path):
    said = extract_activations(checkpoint, documents, tmp_path / "s", dry_run=True, **small)
    done = extract_activations(checkpoint, documents, finished, **small)
    assert not (tmp_path / "s").exists()
    assert (said.samples, said.tokens, said.units) == (done.samples, done.tokens, done.units)
    assert said.padding_fraction == pytest.approx(done.padding_fraction)
    assert said.bytes == 3 * done.tokens * 32 * 4
    assert said.shapes == [[1, 256]]


def test_statistics_are_those_of_the_rows(finished):
    arrays, rows = everything(finished)
    found = inspect_activations(str(finished)).statistics["residual.00002"]
    norms = np.linalg.norm(arrays["residual.00002"].astype(np.float64), axis=1)
    assert found["norm_mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert found["norm_max"] == pytest.approx(norms.max(), rel=1e-5)
    first = norms[rows.positions == 0].mean()
    assert found["first_token_norm_mean"] == pytest.approx(first, rel=1e-5)


def test_sinks_are_counted_by_position():
    norms = np.array([1, 1, 50, 1, 40, 1, 1, 1], np.float32)
    found = unit_statistics(norms, np.array([0, 1, 2, 3, 0, 1, 2, 3]), np.zeros(4))
    assert (found["sink_tokens"], found["sink_tokens_at_first"]) == (2, 1)


def test_zarr_python_reads_the_arrays_as_they_are(finished):
    reader = ActivationReader(str(finished), layer=0)
    done = store.read_done(KeyValueStore(finished), 1)
    path = finished / "units" / "00001" / done["attempt"]
    start = store.read_done(KeyValueStore(finished), 0)["tokens"]
    theirs = zarr.open_array(path / "residual.00000", mode="r")[:]
    np.testing.assert_array_equal(theirs, reader[start : start + len(theirs)])
    tokens = zarr.open_array(path / "tokens", mode="r")[:]
    np.testing.assert_array_equal(tokens, reader.rows(slice(start, start + len(tokens))).tokens)


# --- the reader -------------------------------------------------------------------------------


def test_rows_are_read_by_number_slice_and_list(finished):
    reader = ActivationReader(str(finished), layer=2)
    whole = reader[:]
    assert whole.shape == reader.shape == (len(reader), 32)
    np.testing.assert_array_equal(reader[-1], whole[-1])
    np.testing.assert_array_equal(reader[100:10:-7], whole[100:10:-7])
    numbers = np.random.default_rng(0).integers(-len(reader), len(reader), 200)
    np.testing.assert_array_equal(reader[numbers], whole[numbers])
    with pytest.raises(IndexError):
        reader[len(reader)]


def test_a_mask_selects_as_in_numpy_and_anything_else_is_refused(finished):
    reader = ActivationReader(str(finished), layer=2)
    whole, n = reader[:], len(reader)
    mask = np.arange(n) % 3 == 0
    for form in (mask, mask.tolist(), torch.from_numpy(mask), jax.numpy.asarray(mask)):
        np.testing.assert_array_equal(reader[form], whole[mask])
        assert reader.rows(form).samples == reader.rows(np.flatnonzero(mask)).samples
    for empty in ([], np.zeros(n, bool), np.zeros(0, np.int64), slice(3, 3)):
        assert reader[empty].shape == (0, 32)
    numbers = torch.tensor([3, -1])
    np.testing.assert_array_equal(reader[numbers], whole[numbers.numpy()])
    wrong = [mask[:-1], np.ones((n, 1), bool), True, (0, 5), (slice(None), 3), ..., None, 1.0]
    wrong += [np.array([1.7]), [[0, 1]], "1", [n], [-n - 1], n, ()]
    for index in wrong:
        with pytest.raises(IndexError):
            reader[index]
    with pytest.raises(IndexError, match="by whole numbers, by a slice, or by a mask of"):
        reader.rows(5)


def test_workers_of_a_torch_loader_share_the_rows(finished, monkeypatch):
    reader = ActivationReader(str(finished), layer=2)
    monkeypatch.setattr(reader, "_pieces", lambda: [(0, i, 1) for i in range(10)])
    info = [types.SimpleNamespace(id=i, num_workers=3) for i in range(3)]
    rows = []
    for worker in info:
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda worker=worker: worker)
        rows += list(reader.batches(1, epochs=1))
    expected = np.sort(reader[:10], axis=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows), axis=0), expected)
    monkeypatch.undo()
    parts = [np.concatenate(list(reader.batches(1, epochs=1, part=(0, 1))))]
    assert len(np.concatenate(parts)) == len(reader)
    with pytest.raises(ConfigError, match=r"is not one of 0\.\.1 of 2 parts"):
        reader.batches(1, part=(2, 2))
    with pytest.raises(ConfigError, match="rows of part 0 of 2"):
        reader.batches(len(reader), part=(0, 2))


@pytest.mark.slow
def test_a_reader_is_a_torch_dataset_also_in_spawned_workers(
    checkpoint, documents, small, tmp_path
):
    url = tmp_path / "s"
    extract_activations(checkpoint, documents, url, **small | {"dtype": "bfloat16", "limit": 10})
    reader = ActivationReader(str(url), layer=0)
    loader = torch.utils.data.DataLoader(
        reader, batch_size=16, num_workers=1, multiprocessing_context="spawn"
    )
    batches = list(loader)
    assert batches[0].dtype == torch.bfloat16
    whole = torch.cat(batches).float().numpy()
    np.testing.assert_array_equal(whole, reader[:].astype(np.float32))


def test_a_torch_dataset_gives_each_worker_and_process_rows_of_its_own(finished):
    reader = ActivationReader(str(finished), layer=2)
    chunks = len(reader._pieces())
    assert chunks >= 4  # or there were nothing to share
    dataset = reader.torch_dataset(1, epochs=1, seed=3)
    alone = torch.cat(list(dataset)).numpy()
    np.testing.assert_array_equal(alone, np.concatenate([*reader.batches(1, epochs=1, seed=3)]))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    shared = torch.cat(list(loader)).numpy()
    halves = [list(reader.torch_dataset(1, epochs=1, part=(i, 2))) for i in range(2)]
    assert all(halves)
    for rows in (shared, torch.cat(halves[0] + halves[1]).numpy()):
        assert len(rows) == len(reader)
        np.testing.assert_array_equal(rows[np.lexsort(rows.T)], alone[np.lexsort(alone.T)])


def test_a_reader_says_that_it_cannot_be_used_after_a_fork(finished, monkeypatch):
    reader = ActivationReader(str(finished), layer=2)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StorageError, match="start workers with the method `spawn`"):
        reader[0]


def test_an_epoch_has_every_row_once_shuffled_by_its_seed(finished):
    reader = ActivationReader(str(finished), layer=2)
    whole = reader[:]

    def stream(**changes):
        batches = list(reader.batches(7, epochs=1, buffer_mb=0.02, **changes))
        assert {batch.shape for batch in batches} == {(7, 32)}
        return np.concatenate(batches)

    seen = stream(seed=1)
    assert len(seen) == len(whole) // 7 * 7
    known = {row.tobytes() for row in whole}
    assert {row.tobytes() for row in seen} <= known
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert counts.max() <= np.unique(whole, axis=0, return_counts=True)[1].max()
    np.testing.assert_array_equal(seen, stream(seed=1))
    assert (seen != stream(seed=2)).any()
    assert (seen[: len(whole) // 2] != whole[: len(whole) // 2]).any()


def test_two_epochs_are_in_different_orders(finished):
    reader = ActivationReader(str(finished), layer=2)
    n = len(reader)
    both = np.concatenate(list(reader.batches(n, epochs=2)))
    assert (both[:n] != both[n:]).any()
    np.testing.assert_array_equal(np.sort(both[:n], axis=0), np.sort(both[n:], axis=0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_come_as_numpy_jax_and_torch(
    dtype, finished, checkpoint, documents, small, tmp_path
):
    url = finished
    if dtype == "bfloat16":
        url = tmp_path / "s"
        extract_activations(checkpoint, documents, url, **small | {"dtype": dtype, "limit": 10})
    reader = ActivationReader(str(url), layer=0)
    numpy_batch, jax_batch, torch_batch = (
        next(reader.batches(16, kind=kind)) for kind in ("numpy", "jax", "torch")
    )
    assert isinstance(jax_batch, jax.Array)
    assert torch_batch.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(np.asarray(jax_batch), numpy_batch)
    np.testing.assert_array_equal(torch_batch.float().numpy(), numpy_batch.astype(np.float32))


def test_special_tokens_can_be_left_out(checkpoint, small, tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    extract_activations(checkpoint, path, tmp_path / "s", **small | {"format": "chat"})
    reader = ActivationReader(str(tmp_path / "s"), layer=0)
    real = int((reader.rows(slice(None)).roles == 0).sum())
    assert len(reader) - real == 4
    assert len(next(reader.batches(real, epochs=1, real_only=True))) == real


def test_a_store_that_is_not_finished_is_read_only_if_asked(
    finished, checkpoint, documents, small, tmp_path
):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    (copy / "units" / "00001" / "done.json").unlink()
    with pytest.raises(StorageError, match="of its"):
        ActivationReader(str(copy), layer=0)
    assert len(ActivationReader(str(copy), layer=0, partial=True)) < len(
        ActivationReader(str(finished), layer=0)
    )
    assert not inspect_activations(str(copy)).complete
    extract_activations(checkpoint, documents, copy, **small)
    assert_equal_stores(copy, finished)


def test_what_a_store_does_not_hold_is_said(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"residual\.00000, residual\.00002"):
        ActivationReader(str(finished), layer=1)
    with pytest.raises(StorageError, match="no activation store"):
        ActivationReader(str(tmp_path))
    with pytest.raises(ConfigError, match="batch_size"):
        ActivationReader(str(finished), layer=0).batches(10**9)


# --- damage -----------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_file_is_found_and_named(finished, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    assert inspect_activations(str(copy), verify=True).errors == []
    rng = random.Random(0)
    unit = copy / "units" / "00000"
    for path in sorted(p for p in [copy / "manifest.json", *unit.rglob("*")] if p.is_file()):
        content = path.read_bytes()
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(4))}
        for at in places:
            flipped = content[at] ^ (1 << rng.randrange(8))
            path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
            if path.name == "manifest.json":
                with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
                    inspect_activations(str(copy), verify=True)
            else:
                errors = inspect_activations(str(copy), verify=True).errors
                assert len(errors) == 1, (path, at)
                assert str(path.relative_to(copy)) in errors[0]
        path.write_bytes(content)


def test_a_file_that_is_gone_is_named_and_never_read_as_zeros(finished, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    for path in sorted(p for p in (copy / "units" / "00001").rglob("*") if p.is_file()):
        if path.name == "done.json":
            continue
        content = path.read_bytes()
        path.unlink()
        errors = inspect_activations(str(copy), verify=True).errors
        assert len(errors) == 1, path
        assert str(path.relative_to(copy)) in errors[0]
        path.write_bytes(content)


def test_chunks_of_zeros_are_stored(tmp_path):
    kv = KeyValueStore(tmp_path)
    zeros = np.zeros((300, 4), np.float32)
    ((write, _),) = ShardedArray(kv, "zeros", zeros.shape, zeros.dtype).put(0, zeros)
    write.result()
    assert (tmp_path / "zeros" / "c" / "0" / "0").stat().st_size > 300 * 4 * 4


# --- stops ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from ping_llm.extraction.run import extract_activations
extract_activations(*sys.argv[1:4], **json.loads(sys.argv[4]))
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_the_store_is_the_same(
    finished, checkpoint, documents, small, tmp_path
):
    kills, wanted = 0, int(os.environ.get("PING_LLM_KILLS", "4"))
    rng = random.Random(0)
    for output in (tmp_path / str(i) for i in itertools.count()):
        command = [sys.executable, "-c", SCRIPT, *map(str, (checkpoint, documents, output))]
        while kills < wanted:
            process = subprocess.Popen([*command, json.dumps(small)], stderr=subprocess.DEVNULL)
            # Not while Python is still importing: from the first file of the store on.
            while process.poll() is None and not output.exists():
                time.sleep(0.01)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0, 4))
            if process.poll() is not None:
                assert process.returncode == 0
                break  # it was faster: a new store for the next
            process.kill()
            process.wait()
            kills += 1
        extract_activations(checkpoint, documents, output, **small)
        assert_equal_stores(output, finished)
        assert inspect_activations(str(output), verify=True).errors == []
        if kills == wanted:
            break


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code_and_leaves_whole_units_only(
    stop, code, finished, checkpoint, documents, small, tmp_path
):
    output = tmp_path / "s"
    # A shell's background job begins with SIGINT ignored, and so would what it starts.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script += "; from ping_llm.cli import main; main()"
    command = [sys.executable, "-c", script, "extract-activations"]
    command += ["--model", checkpoint, "--input", documents, "--output", output]
    for name, value in small.items():
        command += [f"--{name.replace('_', '-')}", value]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not output.exists():
        time.sleep(0.01)
    process.send_signal(stop)  # while it loads or compiles
    _, shown = process.communicate()
    assert process.returncode == code, shown
    kv = KeyValueStore(output)
    done = store.read_all_done(kv, len(store.open_manifest(kv)["units"]))
    attempts = {(unit, entry["attempt"]) for unit, entry in done.items()}
    found = {(int(key.split("/")[1]), key.split("/")[2]) for key in kv.keys("units/")}
    assert {pair for pair in found if pair[1] != "done.json"} == attempts
    extract_activations(checkpoint, documents, output, **small)
    assert_equal_stores(output, finished)


def test_attempts_that_were_not_published_go_once_they_are_old(finished, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    kv = KeyValueStore(copy)
    done = store.read_all_done(kv, len(store.open_manifest(kv)["units"]))
    old, new = "20200101T000000Z-00000000", store.new_attempt()
    for attempt in (old, new):
        kv.write(f"units/00000/{attempt}/tokens/zarr.json", b"{}")
    store.remove_stale(kv, done, older_than_s=3600)
    left = {key.split("/")[2] for key in kv.keys("units/00000/")}
    assert left == {"done.json", done[0]["attempt"], new}
    assert_equal_stores(copy, finished)


def test_an_error_in_the_input_leaves_what_was_finished(checkpoint, documents, small, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(documents.read_bytes() + b'{"nothing": 1}\n')
    for _ in range(20):  # units come in a random order: the bad one may be the first
        with pytest.raises(DataError, match="no string `text`"):
            extract_activations(checkpoint, path, tmp_path / "s", **small)
        found = inspect_activations(str(tmp_path / "s"), verify=True)
        assert found.errors == []
        assert found.units_done < found.units
        if found.units_done:
            break
    else:
        pytest.fail("no unit was ever finished before the bad one")


# --- other places and models ------------------------------------------------------------------


@pytest.fixture
def bucket(request, tmp_path, monkeypatch):
    """The URL of a bucket in the emulator that the test asks for."""
    import emulators

    emulator = {"s3": emulators.s3, "gs": emulators.gcs}[request.param]
    with open(tmp_path / "log", "wb") as log, emulator(log) as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield {"s3": "s3://bucket", "gs": "gs://anonymous@bucket"}[request.param]


def upload(directory, url):
    for path in directory.iterdir():
        (Location(url) / path.name).upload(path)


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_an_object_store_holds_the_same(
    bucket, finished, checkpoint, documents, small, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, inputs, url = (f"{bucket}/{name}" for name in ("model", "inputs", "store"))
    upload(checkpoint, model)
    upload(documents.parent, inputs)
    extract_activations(model, inputs, url, **small)
    assert_equal_stores(url, finished)
    assert inspect_activations(url, verify=True).errors == []


SMALL_RUN = {"steps": 2, "batch_size": 4, "seq_len": 128}
SMALL_MODEL = ["model.n_layers=2", "model.d_model=32", "model.d_ff=48", "model.head_dim=8"]
FROM_RUN = {"format": "measurements", "batch_tokens": 512, "sites": "residual,attn"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with measurements, their rows, a run on them, and a store of the two."""
    from ping_llm.training.loop import train

    place = tmp_path_factory.mktemp("trained")
    simulate(place / "p.parquet", probes=8, days=2.0, measurements=800, seed=0)
    prepare_data([str(place / "p.parquet")], output=str(place / "rows"))
    train(place / "rows", place / "run", overrides=SMALL_MODEL, **SMALL_RUN)
    extract_activations(place / "run", place / "rows", place / "store", **FROM_RUN)
    return place


def test_a_run_of_our_own_is_extracted(trained):
    found = inspect_activations(trained / "store", verify=True)
    reader = ActivationReader(trained / "store", layer=1)
    assert reader.shape == (found.tokens, 32)
    assert reader.rows(slice(0, 1)).samples == ["train/0/0"]
    assert found.errors == []


def test_rows_that_were_prepared_again_are_the_same_input(trained, tmp_path):
    prepare_data([str(trained / "p.parquet")], output=str(tmp_path / "rows"))
    path = tmp_path / "rows" / "dataset.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"seconds": 99.0, "peak_rss_bytes": 99}))
    again = extract_activations(trained / "run", tmp_path / "rows", trained / "store", **FROM_RUN)
    assert again.units_done == again.units


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_rows_are_read_from_object_stores(bucket, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(trained / "rows", f"{bucket}/rows")
    extract_activations(trained / "run", f"{bucket}/rows", tmp_path / "s", **FROM_RUN)
    assert_equal_stores(tmp_path / "s", trained / "store")


MESH_SCRIPT = """
import json, sys, jax
from ping_llm.extraction.run import extract_activations
assert jax.device_count() == 4
extract_activations(*sys.argv[1:4], mesh="data=1,fsdp=2,tensor=2", **json.loads(sys.argv[4]))
"""


@pytest.mark.slow
def test_a_model_sharded_over_devices_gives_the_same(
    finished, checkpoint, documents, small, tmp_path
):
    command = [sys.executable, "-c", MESH_SCRIPT, checkpoint, documents, tmp_path / "s"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [*map(str, command), json.dumps(small)]
    subprocess.run(command, check=True, env=environment)
    (ours, our_rows), (theirs, their_rows) = everything(tmp_path / "s"), everything(finished)
    np.testing.assert_array_equal(our_rows.tokens, their_rows.tokens)
    for name in ours:
        assert parity.relative_l2(ours[name], theirs[name]) < 1e-5
