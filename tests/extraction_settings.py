"""Settings of an extraction, for tests."""

from ping_llm.extraction.config import ExtractionConfig


def settings(**changes):
    defaults = {
        "format": "text",
        "layers": (0,),
        "sites": ("residual",),
        "max_length": 64,
        "overlong": "error",
        "batch_tokens": 256,
        "dtype": "float32",
        "compute_dtype": "float32",
        "compression": "none",
        "unit_mb": 1.0,
        "limit": None,
    }
    return ExtractionConfig(**defaults | changes)
