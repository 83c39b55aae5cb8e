"""Stores compared, for tests."""

import dataclasses

import numpy as np

from ping_llm.activations import store
from ping_llm.activations.reader import ActivationReader
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
