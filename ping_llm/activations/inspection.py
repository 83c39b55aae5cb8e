"""A look at a store: what it holds, whether it is whole, and who is at work on it."""

import dataclasses
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm.activations import store
from ping_llm.activations.claims import read_claim
from ping_llm.activations.reader import open_array, open_manifest, read_result
from ping_llm.errors import StorageError
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore


@dataclasses.dataclass(frozen=True)
class WorkerProgress:
    """What one worker has done and is doing.

    Attributes:
        units: Number of units it published.
        samples: Number of prompts in them.
        tokens: Number of tokens in them.
        seconds: Time it spent on them.
        leased: The units that it holds and has not published.
        stale: Those of them whose lease was not renewed for its whole length; None: not watched.
    """

    units: int
    samples: int
    tokens: int
    seconds: float
    leased: list[int]
    stale: list[int] | None


@dataclasses.dataclass(frozen=True)
class InspectResult:
    """What `inspect_activations` returns.

    Attributes:
        samples: Number of prompts in published units.
        tokens: Number of tokens in them.
        layers: Layers held.
        sites: Sites held.
        d_model: Width of an activation.
        dtype: Of the stored activations.
        units_done: Number of published units.
        units: Number of all units.
        bytes: Size of all arrays, before compression.
        complete: Whether every unit is published.
        workers: {worker: what it has done and is doing}.
        stale_leases: The units whose lease was not renewed for its whole length; None: not watched,
            and one look cannot tell.
        lease_seconds: Length of a lease.
        eta_seconds: Time left if those who hold units go on as units took until now, each at its
            own; None where nobody does, or nothing is published yet.
        statistics: {array: norms and attention sinks over all units}.
        made_from: Names of model and input, and what computed the store.
        errors: What is wrong, each naming the file; without `verify` only what shows by itself.
    """

    samples: int
    tokens: int
    layers: list[int]
    sites: list[str]
    d_model: int
    dtype: str
    units_done: int
    units: int
    bytes: int
    complete: bool
    workers: dict[str, WorkerProgress]
    stale_leases: list[int] | None
    lease_seconds: float
    eta_seconds: float | None
    statistics: dict[str, dict[str, float]]
    made_from: dict[str, str]
    errors: list[str]


def inspect_activations(url: str, *, verify: bool = False, watch: bool = False) -> InspectResult:
    """Returns what a store holds.

    Args:
        url: Where it is.
        verify: Whether every byte is read and compared with its checksum.
        watch: Whether to watch the units that workers hold for up to a lease, to find the leases
            that nobody renews. Renewals come every third of it.

    Raises:
        StorageError: There is no store, or its manifest is damaged.
    """
    kv = KeyValueStore(url)
    manifest = open_manifest(kv)
    errors: list[str] = []
    done: dict[int, dict[str, Any]] = {}
    leases: dict[int, _Lease] = {}
    for unit in range(len(manifest["units"])):
        try:
            published = store.read_done(kv, unit)
            if published is not None:
                done[unit] = published
            elif (lease := _look(kv, unit)) is not None:
                leases[unit] = lease
        except StorageError as error:
            errors.append(str(error))
            continue
        if published is not None and published["identity"] != store.identity(manifest):
            errors.append(f"{url}/{store.done_key(unit)} is of a store with other settings")
    stale = _watch(kv, leases, manifest["lease_seconds"]) if watch else None
    entries = list(done.values())
    if verify:
        total = sum(entry["bytes"] for entry in entries)
        with progress("verify", total=total, unit="bytes") as bar:
            for entry in entries:
                for name in entry["arrays"]:
                    errors += _verify(kv, entry, name)
                bar.update(entry["bytes"])
    sites = [entry["site"] for entry in manifest["arrays"]]
    layers = {entry["layer"] for entry in manifest["arrays"]} - {None}
    workers = _by_worker(entries, leases, stale)
    return InspectResult(
        samples=sum(entry["samples"] for entry in entries),
        tokens=sum(entry["tokens"] for entry in entries),
        layers=sorted(layers),
        sites=list(dict.fromkeys(sites)),
        d_model=manifest["d_model"],
        dtype=manifest["settings"]["dtype"],
        units_done=len(done),
        units=len(manifest["units"]),
        bytes=sum(entry["bytes"] for entry in entries),
        complete=len(done) == len(manifest["units"]),
        workers=workers,
        stale_leases=stale,
        lease_seconds=manifest["lease_seconds"],
        eta_seconds=_eta(workers, left=len(manifest["units"]) - len(done)),
        statistics={
            entry["name"]: _overall([unit["statistics"][entry["name"]] for unit in entries])
            for entry in manifest["arrays"]
        },
        made_from=manifest["made_from"],
        errors=errors,
    )


# --- who is at work ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Lease:
    worker: str
    generation: bytes


def _look(kv: KeyValueStore, unit: int) -> _Lease | None:
    """Returns the lease on a unit, or None where nobody says to hold it."""
    claim, generation = read_claim(kv, unit)
    return _Lease(claim["worker"], generation) if claim is not None and claim["held"] else None


def _watch(kv: KeyValueStore, leases: Mapping[int, _Lease], lease_s: float) -> list[int]:
    """Returns the units whose lease does not change for its whole length."""
    until, unchanged = time.monotonic() + lease_s, set(leases)
    with progress("watch leases", total=len(leases), unit="seen alive") as bar:
        while unchanged:
            last = time.monotonic() >= until
            unchanged = {
                unit
                for unit in unchanged
                if _look(kv, unit) == leases[unit] and store.read_done(kv, unit) is None
            }
            bar.update(done=len(leases) - len(unchanged))
            if last:
                break
            time.sleep(max(min(lease_s / 12, until - time.monotonic()), 0.0))
    return sorted(unchanged)


def _by_worker(
    done: list[dict[str, Any]], leases: Mapping[int, _Lease], stale: list[int] | None
) -> dict[str, WorkerProgress]:
    found = {}
    names = {entry["worker"] for entry in done} | {lease.worker for lease in leases.values()}
    for name in sorted(names):
        own = [entry for entry in done if entry["worker"] == name]
        leased = [unit for unit, lease in leases.items() if lease.worker == name]
        found[name] = WorkerProgress(
            units=len(own),
            samples=sum(entry["samples"] for entry in own),
            tokens=sum(entry["tokens"] for entry in own),
            seconds=sum(entry["seconds"] for entry in own),
            leased=leased,
            stale=None if stale is None else [unit for unit in leased if unit in stale],
        )
    return found


def _eta(workers: Mapping[str, WorkerProgress], *, left: int) -> float | None:
    at_work = sum(set(one.leased) > set(one.stale or ()) for one in workers.values())
    units = sum(one.units for one in workers.values())
    if not left:
        return 0.0
    if not at_work or not units:
        return None
    return sum(one.seconds for one in workers.values()) / units * left / at_work


# --- what it holds ----------------------------------------------------------------------------


def _overall(units: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the statistics of units as those of their union."""
    units = [unit for unit in units if unit["tokens"]]
    if not units:
        return {}

    def mean(name: str, weight: str) -> float:
        weights = sum(unit[weight] for unit in units)
        return sum(unit[name] * unit[weight] for unit in units) / weights

    return {
        "norm_mean": mean("norm_mean", "tokens"),
        "norm_max": max(unit["norm_max"] for unit in units),
        "first_token_norm_mean": mean("first_token_norm_mean", "first_tokens"),
        "sink_tokens": sum(unit["sink_tokens"] for unit in units),
        "sink_tokens_at_first": sum(unit["sink_tokens_at_first"] for unit in units),
    }


def _verify(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> list[str]:
    """Returns what is wrong with an array of a unit."""
    key = store.attempt_prefix(done["unit"], done["attempt"]) + name
    entry = done["arrays"][name]
    metadata, _ = kv.read(f"{key}/zarr.json")
    if metadata is None or zlib.crc32(metadata) != entry["zarr_crc32"]:
        return [f"{kv.url}/{key}/zarr.json is {'gone' if metadata is None else 'damaged'}"]
    array = open_array(kv, done, name)
    errors, shard = [], entry["shard_shape"]
    places = np.ndindex(
        *(-(-size // step) for size, step in zip(entry["shape"], shard, strict=True))
    )
    for place, expected in zip(places, entry["crc32"], strict=True):
        file = "/".join(["c", *map(str, place)])
        part = tuple(
            slice(at * step, min((at + 1) * step, size))
            for at, step, size in zip(place, shard, entry["shape"], strict=True)
        )
        try:
            content = np.ascontiguousarray(read_result(array[part].read(), f"{kv.url}/{key}"))
        except StorageError as error:
            errors.append(f"{kv.url}/{key}/{file} is damaged: {error}")
            continue
        if zlib.crc32(content.view(np.uint8).data) != expected:
            errors.append(f"{kv.url}/{key}/{file} is damaged: its checksum does not fit")
    return errors
