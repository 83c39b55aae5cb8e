"""Training: from probe rows to checkpoints."""
