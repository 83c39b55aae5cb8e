"""The one decoder and its configuration."""
