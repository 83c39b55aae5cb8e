"""`ping-llm serve`: a predictor over HTTP, and a page to look at what it says."""
