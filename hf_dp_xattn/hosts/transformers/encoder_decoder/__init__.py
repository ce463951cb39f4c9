"""Encoder-decoder models of transformers: the decoder's cross-attention reads releases of what the encoder made of a private document."""
