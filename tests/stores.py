"""Stores compared, for tests."""

import dataclasses

import numpy as np

from ping_llm.activations import store
from ping_llm.activations.begin import open_store
from ping_llm.activations.reader import ActivationReader
from ping_llm.activations.writer import UnitWriter
from ping_llm.storage import KeyValueStore


def everything(url):
    """Returns all rows of a store: activations by array, and what stands beside them."""
    manifest = store.open_manifest(KeyValueStore(url))
    readers = {
        entry["name"]: ActivationReader(url, site=entry["site"], layer=entry["layer"])
        for entry in manifest["arrays"]
    }
    rows = next(iter(readers.values())).rows(slice(None))
    return {name: reader[:] for name, reader in readers.items()}, rows


def assert_equal_stores(left, right):
    (ours, our_rows), (theirs, their_rows) = everything(left), everything(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    for field in dataclasses.fields(our_rows):
        np.testing.assert_array_equal(
            getattr(our_rows, field.name), getattr(their_rows, field.name)
        )


def write_store(path, rows, lengths, *, roles=None, unit_prompts=20):
    """Writes a finished store of made-up activations, site `residual`, and returns its path.

    Args:
        path: Where to.
        rows: {layer: activations [tokens, D], float32}.
        lengths: Tokens of each prompt.
        roles: Of each token; None: all real.
        unit_prompts: Prompts of a work unit.
    """
    width = next(iter(rows.values())).shape[1]
    offsets = np.cumsum([0, *lengths])
    roles = np.zeros(offsets[-1], np.uint8) if roles is None else roles
    units = [(i, min(i + unit_prompts, len(lengths))) for i in range(0, len(lengths), unit_prompts)]
    names = {layer: store.array_name("residual", layer) for layer in rows}
    manifest = {
        "schema_version": store.SCHEMA_VERSION,
        "settings": {"dtype": "float32", "format": "tokens"},
        "model": {"weights": "none"},
        "input": {
            "lengths": list(map(int, lengths)),
            "sum": float(sum(map(np.sum, rows.values()))),
        },
        "lease_seconds": 60.0,
        "d_model": width,
        "arrays": [{"name": n, "site": "residual", "layer": i} for i, n in names.items()],
        "units": [(0, *unit) for unit in units],
        "made_from": {"model": "nobody's", "input": "nothing"},
    }
    kv = KeyValueStore(path)
    identity = open_store(kv, manifest)
    for number, (first, stop) in enumerate(units):
        begin, end = offsets[first], offsets[stop]
        prompts = store.UnitPrompts(
            tokens=np.arange(begin, end, dtype=np.int32) % 251,
            offsets=offsets[first : stop + 1] - begin,
            roles=roles[begin:end],
            ids=[f"prompt{i}" for i in range(first, stop)],
            overlong=0,
            empty=0,
        )
        form = {"dtype": np.dtype(np.float32), "zstd": False, "store_identity": identity}
        widths = dict.fromkeys(names.values(), width)
        writer = UnitWriter(kv, number, store.new_attempt(), widths, prompts, **form)
        for layer, name in names.items():
            own = rows[layer][begin:end]
            writer.put(name, 0, own, np.linalg.norm(own, axis=1))
            writer.add_sum(name, own.sum(axis=0))
        writer.commit(writer.finish({"worker": "w", "seconds": 0.0, "peak_device_bytes": None}))
    return path


def marker(unit):
    """Returns what the commit marker of a unit without a token says."""
    counts = dict.fromkeys(("samples", "tokens", "overlong", "empty", "bytes"), 0)
    made = {"unit": unit, "attempt": "a", "identity": "i", "worker": "w", "seconds": 0.0}
    return counts | made | {"peak_device_bytes": None, "arrays": {}, "statistics": {}}
