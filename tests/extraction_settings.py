"""Settings of an extraction, for tests."""

from ping_llm.extraction.settings import ExtractSettings


def settings(**changes):
    """Returns settings of a model of one layer with nothing left open."""
    defaults = {"model": "model", "input": "input", "output": "output", "batch_tokens": 256}
    chosen = ExtractSettings(**defaults | changes)
    return chosen.for_model(n_layers=1, max_length=64, dtype="float32")
