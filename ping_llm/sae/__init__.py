"""Sparse autoencoders: trained on an activation store, measured, saved, and looked into."""
