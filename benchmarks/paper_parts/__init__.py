"""The parts of `benchmarks/paper.py`: each measures some claims of the paper and returns plain numbers."""
