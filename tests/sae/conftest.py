import numpy as np
import pytest
from stores import write_store


def planted_rows(seed, tokens, width=16, directions=24):
    """Returns sums of about three of some directions, [tokens, width]."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((directions, width))
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    active = rng.random((tokens, directions)) < 3 / directions
    strength = active * (0.5 + rng.exponential(0.5, active.shape))
    noise = 0.02 * rng.standard_normal((tokens, width))
    return (10 * (strength @ basis + noise) + 4).astype(np.float32)


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory):
    """A store of two layers, 60 prompts of 30 to 50 tokens, a tenth of them special."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(30, 50, 60)
    tokens = int(lengths.sum())
    roles = (rng.random(tokens) < 0.1).astype(np.uint8)
    rows = {1: planted_rows(1, tokens), 4: planted_rows(4, tokens)}
    return write_store(tmp_path_factory.mktemp("planted") / "acts", rows, lengths, roles=roles)
