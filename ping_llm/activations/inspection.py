"""What a store holds, whether it is whole, and which workers are active."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ping_llm import settings
from ping_llm.activations import store
from ping_llm.activations.arrays import verify_array
from ping_llm.activations.claims import Holder, find_stale, read_holder
from ping_llm.activations.settings import InspectActivationsSettings
from ping_llm.activations.statistics import combine
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
class InspectActivationsResult:
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
    statistics: dict[str, dict[str, float | None]]
    made_from: dict[str, str]
    errors: list[str]


@settings.takes(InspectActivationsSettings)
def inspect_activations(chosen: InspectActivationsSettings) -> InspectActivationsResult:
    """Returns what a store holds.

    Raises:
        StorageError: There is no store, or its manifest is damaged.
    """
    kv = KeyValueStore(chosen.url)
    manifest = store.open_manifest(kv)
    errors: list[str] = []
    done: dict[int, dict[str, Any]] = {}
    holders: dict[int, Holder] = {}
    identity = store.identity(manifest)

    def look(unit: int) -> None:
        try:
            if (published := store.read_done(kv, unit)) is not None:
                marker = f"{kv.url}/{store.done_key(unit)}"
                missing = {entry["name"] for entry in manifest["arrays"]} - {
                    *published["statistics"]
                }
                if missing:
                    raise StorageError(f"{marker} lacks {', '.join(sorted(missing))}")
                done[unit] = published
                if published["identity"] != identity:
                    errors.append(f"{marker} is of a store with other settings")
            elif (holder := read_holder(kv, unit)) is not None:
                holders[unit] = holder
        except StorageError as error:
            errors.append(str(error))

    with ThreadPoolExecutor(16) as pool:  # many small reads
        list(pool.map(look, range(len(manifest["units"]))))
    done, holders = dict(sorted(done.items())), dict(sorted(holders.items()))
    errors.sort()
    stale = find_stale(kv, holders, manifest["lease_seconds"]) if chosen.watch else None
    entries, units = list(done.values()), len(manifest["units"])
    counts = store.totals(entries, "samples", "tokens", "bytes")
    if chosen.verify:
        with progress("verify", total=counts["bytes"], unit="bytes") as bar:
            for entry in entries:
                for name in entry["arrays"]:
                    errors += verify_array(kv, entry, name)
                bar.update(entry["bytes"])
    workers = _by_worker(entries, holders, stale)
    return InspectActivationsResult(
        **counts,
        layers=sorted({entry["layer"] for entry in manifest["arrays"]} - {None}),
        sites=list(dict.fromkeys(entry["site"] for entry in manifest["arrays"])),
        d_model=manifest["d_model"],
        dtype=manifest["settings"]["dtype"],
        units_done=len(done),
        units=units,
        complete=len(done) == units,
        workers=workers,
        stale_leases=stale,
        lease_seconds=manifest["lease_seconds"],
        eta_seconds=_eta(workers, left=units - len(done)),
        statistics={
            entry["name"]: combine([unit["statistics"][entry["name"]] for unit in entries])
            for entry in manifest["arrays"]
        },
        made_from=manifest["made_from"],
        errors=errors,
    )


def _by_worker(
    done: list[dict[str, Any]], holders: Mapping[int, Holder], stale: list[int] | None
) -> dict[str, WorkerProgress]:
    workers = {}
    names = {entry["worker"] for entry in done} | {holder.worker for holder in holders.values()}
    for name in sorted(names):
        own = [entry for entry in done if entry["worker"] == name]
        leased = [unit for unit, holder in holders.items() if holder.worker == name]
        workers[name] = WorkerProgress(
            units=len(own),
            **store.totals(own, "samples", "tokens", "seconds"),
            leased=leased,
            stale=None if stale is None else [unit for unit in leased if unit in stale],
        )
    return workers


def _eta(workers: Mapping[str, WorkerProgress], *, left: int) -> float | None:
    at_work = sum(set(one.leased) > set(one.stale or ()) for one in workers.values())
    units = sum(one.units for one in workers.values())
    if not left:
        return 0.0
    if not at_work or not units:
        return None
    return sum(one.seconds for one in workers.values()) / units * left / at_work
