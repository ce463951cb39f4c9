"""Decoder-only models of transformers: a private prefix (a system prompt) is read through its release in every layer."""
