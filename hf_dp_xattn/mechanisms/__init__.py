"""Mechanisms: from keys and values to a released structure (kernel_sum), and how queries read it. Knows no host library."""
