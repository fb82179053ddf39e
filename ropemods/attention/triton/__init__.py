"""Kernels of our own for CUDA, in Triton: `spans` says which keys a row sees, `row_stats` reads its entropy.

Nothing here is imported before it is used, since Triton is not on every machine; `ropemods.attention.statistics` says
when that is.
"""
