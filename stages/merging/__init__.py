"""A model with an adapter → one model, and how far the two lie apart."""

import stages.model  # noqa: F401  the BLAS comes before MLX
