"""A model with an adapter, and token rows → a trained adapter. A run may be interrupted and go on."""

import stages.model  # noqa: F401  the BLAS comes before MLX
