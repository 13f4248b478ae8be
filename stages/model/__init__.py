"""A base model's folder → an MLX model.

Importing it settles how this process rounds (numerics.py) and loads the optimised BLAS, which must precede the first
import of NumPy and of `mlx.core`. `$LORABUILD_NUMERICS` chooses; commands set it by `model.numerics`.
"""

import os

from stages.model import numerics

numerics.settle(os.environ.get(numerics.VARIABLE) or numerics.PORTABLE)
