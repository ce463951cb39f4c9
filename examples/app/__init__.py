"""A page where epsilon is a slider: `python examples/app/app.py`."""
