"""Stable Diffusion and its kin: the UNet's cross-attention reads what was released of a prompt."""
