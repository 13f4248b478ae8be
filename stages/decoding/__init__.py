"""Prompts' tokens → answers, and the tables that keep both."""

import stages.model  # noqa: F401  the BLAS comes before MLX
