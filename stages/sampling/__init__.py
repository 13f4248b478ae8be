"""Prompts → their tokens → answers."""

import stages.model  # noqa: F401  the BLAS comes before MLX
