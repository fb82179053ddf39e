"""Softmax attention with the terms the modifications add; knows nothing of transformers.

`rows` says what one attention call computes, `reference` is the naive fp64 oracle, `eager` and `sdpa` are the two
ways to the same answer. `paths` says which kernels `sdpa` runs: stock ones (`flash` wraps those that return a
log-sum-exp, `cpu_column` keeps the BOS column out of them, `cpu_decode` decodes), our own (`triton/`) or `flex`.
"""
