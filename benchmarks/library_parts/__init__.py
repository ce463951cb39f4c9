"""Parts of `benchmarks/library.py`."""
