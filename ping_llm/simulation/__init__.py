"""Synthetic networks and their measurements."""
