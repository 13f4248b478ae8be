"""A model and token rows → an adapter on it, batches, losses; frozen layers run once, CPU kernels.

Shapes in names: B rows of a batch, L tokens of the longest row, N trained positions, V vocabulary, D width.
"""

import stages.model  # noqa: F401  the BLAS comes before MLX
