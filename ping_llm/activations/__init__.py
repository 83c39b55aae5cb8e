"""Stores of activations: written, claimed, read and inspected without JAX."""
