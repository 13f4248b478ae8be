"""A model with an adapter → one model, and the distance between the predictions of the two."""

import stages.model  # noqa: F401  the BLAS comes before MLX
