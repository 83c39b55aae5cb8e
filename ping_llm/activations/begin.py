"""Beginning a store, or joining those that work on it."""

import json
from collections.abc import Mapping
from typing import Any

from ping_llm.activations import store
from ping_llm.activations.claims import Holder, find_stale, read_holder, release_stale
from ping_llm.errors import StorageError
from ping_llm.hashing import digest, seal
from ping_llm.settings import differences, refuse_changes
from ping_llm.storage import KeyValueStore


def open_store(kv: KeyValueStore, manifest: Mapping[str, Any]) -> str:
    """Writes the manifest of a store where there is none; returns the identity of the store.

    A store that was begun with other settings is begun anew if nothing was published in it and
    nobody works on it. Telling a dead worker from a living one takes a lease.

    Raises:
        ConfigError: The store was begun with other settings, another model or another input.
        StorageError: It cannot be written, or its manifest is damaged.
    """
    data = seal(dict(manifest))
    manifest = json.loads(data)  # as it will be read back
    while not kv.create(store.MANIFEST, data):
        _, generation = kv.read(store.MANIFEST)
        stored = store.open_manifest(kv)
        before, now = _facts(stored), _facts(manifest)
        if not differences(before, now):
            return store.identity(stored)
        dead = _dead_holders(kv, stored["lease_seconds"])
        if dead is None:
            refuse_changes(before, now, kv.url)
        elif kv.swap(store.MANIFEST, data, generation) is not None:
            for unit, holder in dead.items():
                release_stale(kv, unit, holder)
    return store.identity(manifest)


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what must be equal for all who work on a store, by names for messages."""
    facts = dict(manifest["settings"])
    for part in ("model", "input"):
        for name, value in manifest[part].items():  # of files there may be thousands
            facts[f"{part} {name}"] = digest(value) if isinstance(value, list) else value
    # With other leases they would take over each other's units.
    return facts | {"lease_seconds": manifest["lease_seconds"]}


def _dead_holders(kv: KeyValueStore, lease_s: float) -> dict[int, Holder] | None:
    """Returns who held units of a store; None if a unit is published, or a holder is alive."""
    holders = {}
    for unit in sorted(int(key.removeprefix("claims/")) for key in kv.keys("claims/")):
        if store.read_done(kv, unit) is not None:
            return None
        if (holder := read_holder(kv, unit)) is not None:
            holders[unit] = holder
    if holders and len(find_stale(kv, holders, lease_s)) < len(holders):
        return None
    return holders


def check_store(kv: KeyValueStore, identity: str) -> None:
    """Makes sure, before a unit is published, that the store is still the one that was opened.

    Raises:
        StorageError: It was begun anew with other settings.
    """
    if store.identity(store.open_manifest(kv)) != identity:
        raise StorageError(
            f"{kv.url} was begun anew with other settings by another worker; nothing more was "
            "written; choose another output"
        )
