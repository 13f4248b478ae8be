"""A model with an adapter, and token rows → a trained adapter, whatever interrupts it."""

import stages.model  # noqa: F401  the BLAS comes before MLX
