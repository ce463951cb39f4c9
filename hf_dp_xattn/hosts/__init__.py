"""Hosts: how the models of diffusers (and transformers) are found, patched, fed and restored."""
