"""Activations of a language or measurement model over data, into a store."""
