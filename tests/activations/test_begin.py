import pytest
from stores import marker

from ping_llm.activations import store
from ping_llm.activations.begin import check_store, open_store
from ping_llm.activations.claims import Claims
from ping_llm.errors import ConfigError, StorageError
from ping_llm.hashing import seal
from ping_llm.storage import KeyValueStore


@pytest.fixture
def kv(tmp_path):
    return KeyValueStore(tmp_path / "store")


def manifest(**changes):
    return {
        "schema_version": store.SCHEMA_VERSION,
        "settings": {"dtype": "float32"} | changes,
        "model": {"weights": "abc"},
        "input": {"files": [{"name": "x"}]},
        "made_from": {},
        "arrays": [],
        "d_model": 8,
        "lease_seconds": 0.3,
        "units": [[0, 0, 1], [0, 1, 2]],
    }


def test_equal_settings_join_and_others_are_refused_once_a_unit_is_published(kv):
    identity = open_store(kv, manifest())
    with Claims(kv, 2) as claims:
        claim = next(claims.available())
    kv.create(store.done_key(claim.unit), seal(marker(claim.unit)))
    assert open_store(kv, manifest()) == identity
    with pytest.raises(ConfigError, match="dtype='float16', was 'float32'"):
        open_store(kv, manifest(dtype="float16"))


def test_others_are_refused_while_a_worker_is_alive(kv):
    open_store(kv, manifest())
    with Claims(kv, 2, lease_s=0.3) as claims:
        next(claims.available())
        with pytest.raises(ConfigError, match="was begun with other settings: dtype="):
            open_store(kv, manifest(dtype="float16"))
    open_store(kv, manifest(dtype="float16"))  # it ended and published nothing


def test_the_claims_of_a_killed_worker_block_for_a_lease_at_most(kv):
    open_store(kv, manifest())
    claims = Claims(kv, 2)  # never renews and never lets go
    assert len(list(claims.available())) == 2
    open_store(kv, manifest(dtype="float16"))
    assert len(list(Claims(kv, 2).available())) == 2


def test_a_worker_does_not_publish_into_a_store_that_was_begun_anew(kv):
    before = open_store(kv, manifest())
    check_store(kv, before)
    now = open_store(kv, manifest(dtype="float16"))
    check_store(kv, now)
    with pytest.raises(StorageError, match="begun anew with other settings"):
        check_store(kv, before)
