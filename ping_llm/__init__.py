"""ping-llm: learn the internet's latencies, and read what language models compute."""

__version__ = "0.1.0"
