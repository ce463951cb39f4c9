"""Models of transformers: their attention functions read releases."""
