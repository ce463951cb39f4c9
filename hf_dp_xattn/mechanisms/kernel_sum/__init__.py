"""`kernel_sum`: one joint noised sum of kernel features over all layers and heads."""
