"""What `inspect-data` shows."""
