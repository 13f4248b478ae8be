"""A base model's folder → an MLX model.

Importing it loads the optimised BLAS first, which must precede the first import of `mlx.core`.
"""

from stages.model import blas

blas.preload()
