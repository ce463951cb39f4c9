"""Fitting `anchors` to PUBLIC contexts: objective, slot decoder, codebooks and cells, choice of the release for each epsilon."""
