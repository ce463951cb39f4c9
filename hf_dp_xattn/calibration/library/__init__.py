"""Calibration of `library`: a public library of texts, and what may answer at each epsilon."""
