"""A model + token rows → a table with each row's scores, one column a model."""

import stages.model  # noqa: F401  the BLAS comes before MLX
