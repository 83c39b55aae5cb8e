"""ping-llm: learn the internet's latencies, and read what language models compute."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ping_llm.activations.reader import ActivationReader
    from ping_llm.extraction.run import extract_activations
    from ping_llm.ingest.prepare import prepare_data
    from ping_llm.inspection.dataset import inspect_data
    from ping_llm.measurements import MeasurementTable
    from ping_llm.prediction.evaluate import evaluate
    from ping_llm.prediction.predictor import Predictor
    from ping_llm.prediction.query import query
    from ping_llm.sae.autoencoder import SparseAutoencoder
    from ping_llm.sae.inspection import inspect_sae
    from ping_llm.sae.loop import train_sae
    from ping_llm.training.inspect_run import inspect_run
    from ping_llm.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "ActivationReader",
    "MeasurementTable",
    "Predictor",
    "SparseAutoencoder",
    "evaluate",
    "extract_activations",
    "inspect_data",
    "inspect_run",
    "inspect_sae",
    "prepare_data",
    "query",
    "train",
    "train_sae",
]

# Where the public names are; each is imported when it is first asked for.
_HOMES = {
    "ActivationReader": "activations.reader",
    "MeasurementTable": "measurements",
    "Predictor": "prediction.predictor",
    "SparseAutoencoder": "sae.autoencoder",
    "evaluate": "prediction.evaluate",
    "extract_activations": "extraction.run",
    "inspect_data": "inspection.dataset",
    "inspect_run": "training.inspect_run",
    "inspect_sae": "sae.inspection",
    "prepare_data": "ingest.prepare",
    "query": "prediction.query",
    "train": "training.loop",
    "train_sae": "sae.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
