import json

import numpy as np
import pytest
from hf_checkpoints import add_tokenizer, make_checkpoint

WORDS = ["the", "then", "that", "cat", "dog", "a", "of", "über", "naïve"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2 with a tokenizer."""
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """60 short texts as JSON lines, some of them empty."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(60):
            text = " ".join(rng.choice(WORDS, rng.integers(0, 25)))
            file.write(json.dumps({"id": f"doc{i}", "text": text}, ensure_ascii=False) + "\n")
    return path


SMALL = {
    "layers": "0,2",
    "sites": "residual,embed",
    "max_length": 128,
    "batch_tokens": 256,
    "unit_mb": 0.001,
    "lease_seconds": 2.0,
}


@pytest.fixture(scope="session")
def small():
    """Settings that make several units and few compiled programs."""
    return SMALL


@pytest.fixture(scope="session")
def finished(checkpoint, documents, small, tmp_path_factory):
    """A finished store in float32, not to be changed."""
    from ping_llm.extraction.run import extract_activations

    output = tmp_path_factory.mktemp("finished") / "store"
    extract_activations(checkpoint, documents, output, **small)
    return output
