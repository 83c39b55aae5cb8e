"""From any input to probe rows."""
