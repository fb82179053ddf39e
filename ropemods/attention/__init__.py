"""Softmax attention with the terms the modifications add; knows nothing of transformers.

`rows` says what one attention call computes, `reference` is the naive fp64 oracle, `eager` and `fused` are the two
ways to the same answer. `paths` says which kernels `fused` runs: stock ones (`flash` wraps those that return a
log-sum-exp, `apart` keeps the BOS column out of them, `few` decodes on a CPU), our own (`triton/`) or `flex`.
"""
