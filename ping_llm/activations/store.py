"""The activation store: a manifest, and work units that are either published whole or not there.

`manifest.json` says what the store is. A unit is computed into a directory of its own attempt,
`units/00012/<attempt>/`, and published by creating `units/00012/done.json`, which names the
attempt, its counts and its checksums. Readers follow `done.json` and nothing else.
"""

import dataclasses
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Required, TypedDict

import msgspec
import numpy as np

from ping_llm.errors import StorageError
from ping_llm.hashing import digest, unseal
from ping_llm.models.config import END_SITES, Dtype
from ping_llm.storage import KeyValueStore

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
STALE_ATTEMPT_S = 3600.0


# --- what a manifest and a commit marker hold; who writes them need not be us ------------------

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class _StoredArray(TypedDict):
    name: str
    site: str
    layer: Count | None


class _StoreSettings(TypedDict):
    dtype: Dtype


class _Manifest(TypedDict):
    schema_version: int
    settings: _StoreSettings
    model: dict[str, Any]
    input: dict[str, Any]
    made_from: dict[str, Any]
    arrays: list[_StoredArray]
    units: list[Any]
    d_model: Count
    lease_seconds: Amount


class _UnitArray(TypedDict):
    crc32: list[Count]
    zarr_crc32: Count
    dtype: str
    shape: list[Count]
    shard_shape: list[Annotated[int, msgspec.Meta(ge=1)]]


class _UnitStatistics(TypedDict, total=False):
    tokens: Required[Count]
    norm_mean: Amount
    norm_max: Amount
    first_tokens: Count
    first_token_norm_mean: Amount | None
    sink_tokens: Count
    sink_tokens_at_first: Count


class _Done(TypedDict):
    unit: Count
    attempt: str
    identity: str
    samples: Count
    tokens: Count
    overlong: Count
    empty: Count
    bytes: Count
    seconds: Amount
    worker: str
    peak_device_bytes: Count | None
    arrays: dict[str, _UnitArray]
    statistics: dict[str, _UnitStatistics]


@dataclasses.dataclass(frozen=True)
class UnitPrompts:
    """The prompts of a work unit, end to end.

    Attributes:
        tokens: Token ids [n], int32.
        offsets: Sample s is `[offsets[s]:offsets[s + 1]]` of the rest [S + 1], int64.
        roles: REAL, SPECIAL or BOS of each token [n], uint8.
        ids: Id of each sample.
        overlong: Number of records that were longer than allowed.
        empty: Number of samples without a token.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    roles: np.ndarray
    ids: list[str]
    overlong: int
    empty: int

    @property
    def positions(self) -> np.ndarray:
        """Position of each token in its sample [n], int64."""
        lengths = np.diff(self.offsets)
        return np.arange(len(self.tokens)) - np.repeat(self.offsets[:-1], lengths)

    @property
    def is_last(self) -> np.ndarray:
        """Whether each token is the last of its sample [n], bool."""
        last = np.zeros(len(self.tokens), bool)
        last[self.offsets[1:][np.diff(self.offsets) > 0] - 1] = True
        return last

    @property
    def counts(self) -> dict[str, int]:
        """How many samples and tokens there are, and how many samples are overlong or empty."""
        counted = {"samples": len(self.ids), "tokens": len(self.tokens)}
        return counted | {"overlong": self.overlong, "empty": self.empty}


def done_key(unit: int) -> str:
    """Returns the key of a unit's commit marker."""
    return f"units/{unit:05d}/done.json"


def attempt_prefix(unit: int, attempt: str) -> str:
    """Returns what the keys of an attempt at a unit begin with."""
    return f"units/{unit:05d}/{attempt}/"


def identity(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of what decides a store's content."""
    return digest({key: manifest[key] for key in ("schema_version", "settings", "model", "input")})


def open_manifest(kv: KeyValueStore) -> dict[str, Any]:
    """Returns the manifest of a store that must be there.

    Raises:
        StorageError: There is no store, or its manifest is damaged or of another version.
    """
    manifest = read_sealed(kv, MANIFEST)
    if manifest is None:
        raise StorageError(f"{kv.url} is no activation store: it has no {MANIFEST}")
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise StorageError(f"{kv.url} has schema_version {version}; expected {SCHEMA_VERSION}")
    _check_form(manifest, _Manifest, f"{kv.url}/{MANIFEST}")
    return manifest


def _check_form(content: dict[str, Any], form: Any, where: str) -> None:
    try:
        msgspec.convert(content, form)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # a lone surrogate
        raise StorageError(f"{where} is malformed: {error}") from None


def read_done(kv: KeyValueStore, unit: int) -> dict[str, Any] | None:
    """Returns what a unit's commit marker says, or None where the unit is not published.

    Raises:
        StorageError: It is damaged.
    """
    done = read_sealed(kv, done_key(unit))
    if done is not None:
        where = f"{kv.url}/{done_key(unit)}"
        _check_form(done, _Done, where)
        whole = {*_UnitStatistics.__annotations__}
        if done["unit"] != unit or any(
            some["tokens"] and not whole <= {*some} for some in done["statistics"].values()
        ):
            raise StorageError(f"{where} is malformed: it is of another unit, or lacks statistics")
    return done


def read_sealed(kv: KeyValueStore, key: str) -> dict[str, Any] | None:
    """Returns what was sealed below `key`, or None where nothing is.

    Raises:
        StorageError: It is damaged.
    """
    data, _ = kv.read(key)
    if data is None:
        return None
    content = unseal(data)
    if content is None:
        raise StorageError(f"{kv.url}/{key} is damaged: its checksum does not fit")
    return content


def read_all_done(kv: KeyValueStore, units: int) -> dict[int, dict[str, Any]]:
    """Returns {unit: what its commit marker says} of the units that are published."""
    with ThreadPoolExecutor(16) as pool:  # many small reads
        markers = enumerate(pool.map(lambda unit: read_done(kv, unit), range(units)))
        return {unit: done for unit, done in markers if done is not None}


def totals(done: Collection[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """Returns {name: its sum over what commit markers say}."""
    return {name: sum(entry[name] for entry in done) for name in names}


def new_attempt() -> str:
    """Returns a name that no other attempt has; it begins with the time, for `remove_stale`."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def remove_stale(
    kv: KeyValueStore, done: Mapping[int, Mapping[str, Any]], *, older_than_s: float
) -> None:
    """Deletes what a complete store does not need and began long ago: attempts, groups' lists."""
    limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - older_than_s))
    attempts = {tuple(key.split("/")[1:3]) for key in kv.keys("units/") if key.count("/") > 2}
    for unit, attempt in sorted(attempts):
        if attempt < limit and done.get(int(unit), {}).get("attempt") != attempt:
            kv.delete(attempt_prefix(int(unit), attempt))
    for group in sorted({key.split("/")[1] for key in kv.keys("groups/")}):
        if group < limit:
            kv.delete(f"groups/{group}/")


def array_name(site: str, layer: int | None) -> str:
    """Returns the name of a site's array, `residual.00007`, or `embed` where there is no layer."""
    return site if layer is None else f"{site}.{layer:05d}"


def site_arrays(sites: Iterable[str], layers: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Returns {name of an array: (site, index among `layers`; 0 where it has no layer)}."""
    return {
        array_name(site, layer): (site, index)
        for site in sites
        for index, layer in enumerate([None] if site in END_SITES else layers)
    }
