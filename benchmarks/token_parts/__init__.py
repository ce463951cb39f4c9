"""Parts of `benchmarks/tokens.py`: models and their contexts, clocks, pages."""
