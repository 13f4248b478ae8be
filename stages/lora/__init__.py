"""The numerical core on MLX: adapter, batches, loss, training loop, scores, merging, sampling.

Importing it loads the optimised BLAS first, which must precede the first import of `mlx.core`. Shapes in names: B rows
of a batch, L tokens of the longest row, N trained positions, V vocabulary, D width.
"""

from stages import blas

blas.preload()
