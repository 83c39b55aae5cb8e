"""The role of each token of a prompt, stored beside its activations."""

REAL, SPECIAL, BOS = range(3)
