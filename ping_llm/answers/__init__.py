"""From what is known about a question to a distribution of RTTs."""
