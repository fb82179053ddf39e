"""Softmax attention with the terms the modifications add; knows nothing of transformers.

`rows` says what one attention call computes, `reference` is the naive fp64 oracle, `eager` and `fused` are the two
fast ways to the same answer, `flash` wraps the kernels that return a log-sum-exp.
"""
