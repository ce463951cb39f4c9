"""Parts of `benchmarks/utility.py`: what the released context is worth, on the shapes pipeline."""
