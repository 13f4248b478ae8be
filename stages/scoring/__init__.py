"""A model and token rows → loss and accuracy of each row, over one process or several."""

import stages.model  # noqa: F401  the BLAS comes before MLX
