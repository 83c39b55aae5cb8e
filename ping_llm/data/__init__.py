"""Measurements: from any input to packed batches of tokens."""
