"""`python -m ping_llm`: the same as `ping-llm`."""

from ping_llm.cli import main

main()
