import numpy as np
import pytest

from ping_llm.bench import peers
from ping_llm.bench.settings import BenchTrainSettings

MODEL = BenchTrainSettings(n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab_size=11).model


@pytest.mark.parametrize("make", [peers.bare_jax, lambda cfg: peers.pytorch(cfg, compiled=False)])
def test_a_peer_trains_a_causal_model(make):
    steps = make(MODEL)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (4, 25), np.int32)
    first = steps(tokens[:, :-1], tokens[:, 1:], 1)
    assert 0.8 * np.log(11) < first < 2 * np.log(11)
    # What comes at random cannot be foreseen by a causal model that does not know it by heart yet,
    # and what repeats can: the second half is the first once more.
    again = np.concatenate([tokens[:, :12], tokens[:, :13]], axis=1)
    assert steps(again[:, :-1], again[:, 1:], 200) < 0.75 * first
