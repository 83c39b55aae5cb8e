"""The activation store: a manifest, and work units that are either published whole or not there.

`manifest.json` says what the store is. A unit is computed into a directory of its own attempt,
`units/00012/<attempt>/`, and published by creating `units/00012/done.json`, which names the
attempt, its counts and its checksums. Readers follow `done.json` and nothing else.
"""

import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ping_llm.errors import ConfigError, StorageError
from ping_llm.hashing import canonical_json, digest, seal, unseal
from ping_llm.storage import KeyValueStore

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
STALE_ATTEMPT_S = 3600.0


def done_key(unit: int) -> str:
    """Returns the key of a unit's commit marker."""
    return f"units/{unit:05d}/done.json"


def attempt_prefix(unit: int, attempt: str) -> str:
    """Returns what the keys of an attempt at a unit begin with."""
    return f"units/{unit:05d}/{attempt}/"


def identity(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of what decides a store's content."""
    return digest({key: manifest[key] for key in ("schema_version", "settings", "model", "input")})


def read_manifest(kv: KeyValueStore) -> dict[str, Any] | None:
    """Returns the manifest, or None where there is no store.

    Raises:
        StorageError: It is damaged, or of a version that this code does not read.
    """
    data, _ = kv.read(MANIFEST)
    if data is None:
        return None
    manifest = unseal(data)
    if manifest is None:
        raise StorageError(f"{kv.url}/{MANIFEST} is damaged: its checksum does not fit")
    if manifest["schema_version"] != SCHEMA_VERSION:
        found = manifest["schema_version"]
        raise StorageError(f"{kv.url} has schema_version {found}; expected {SCHEMA_VERSION}")
    return manifest


def open_store(kv: KeyValueStore, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest in place: `manifest` where there was none, else one with equal content.

    Raises:
        ConfigError: The store was begun with other settings, another model or another input.
    """
    manifest = json.loads(canonical_json(manifest))  # as it will be read back
    kv.create(MANIFEST, seal(manifest))
    stored = read_manifest(kv)
    if stored is None:
        raise StorageError(f"{kv.url}/{MANIFEST} was written and is not there")
    differences = [
        difference
        for part in ("settings", "model", "input")
        for difference in _differences(stored[part], manifest[part])
    ]
    # Not of the content, but workers with other leases would take each other's units.
    leases = [{"lease_seconds": one.get("lease_seconds")} for one in (stored, manifest)]
    differences += _differences(*leases)
    if differences:
        raise ConfigError(
            f"{kv.url} was begun with other settings: {'; '.join(differences)}; "
            "use those, or another output"
        )
    return stored


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {_shown(old.get(name))}, now {_shown(new.get(name))}" for name in changed]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def read_done(kv: KeyValueStore, unit: int) -> dict[str, Any] | None:
    """Returns what a unit's commit marker says, or None where the unit is not published.

    Raises:
        StorageError: It is damaged.
    """
    data, _ = kv.read(done_key(unit))
    if data is None:
        return None
    done = unseal(data)
    if done is None:
        raise StorageError(f"{kv.url}/{done_key(unit)} is damaged: its checksum does not fit")
    return done


def read_all_done(kv: KeyValueStore, units: int) -> dict[int, dict[str, Any]]:
    """Returns {unit: what its commit marker says} of the units that are published."""
    with ThreadPoolExecutor(16) as pool:  # many small reads
        found = enumerate(pool.map(lambda unit: read_done(kv, unit), range(units)))
        return {unit: done for unit, done in found if done is not None}


def new_attempt() -> str:
    """Returns a name that no other attempt has; it begins with the time, for `remove_stale`."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def remove_stale(
    kv: KeyValueStore, done: Mapping[int, Mapping[str, Any]], *, older_than_s: float
) -> None:
    """Deletes what a complete store does not need and began long ago: attempts, groups' lists."""
    limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - older_than_s))
    found = {tuple(key.split("/")[1:3]) for key in kv.keys("units/") if key.count("/") > 2}
    for unit, attempt in sorted(found):
        if done[int(unit)]["attempt"] != attempt and attempt < limit:
            kv.delete(attempt_prefix(int(unit), attempt))
    for group in sorted({key.split("/")[1] for key in kv.keys("groups/")}):
        if group < limit:
            kv.delete(f"groups/{group}/")


def array_name(site: str, layer: int | None) -> str:
    """Returns the name of a site's array, `residual.00007`, or `embed` where there is no layer."""
    return site if layer is None else f"{site}.{layer:05d}"
