"""Kernels of our own for CUDA, in Triton: `spans` says which keys a row sees.

`attend` does a whole attention call with every term, forward and backward (`attend_kernels`, `decode_kernels` for few
queries and many keys, `gradient_kernels`); `row_stats` reads lse and entropy alone, for a stock kernel beside it.

Nothing here is imported before it is used, since Triton is not on every machine; `ropemods.attention.paths` says when
that is.
"""
