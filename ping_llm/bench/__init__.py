"""What `ping-llm bench` measures; imported by its command alone."""
