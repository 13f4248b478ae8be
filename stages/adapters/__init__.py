"""Adapters in other people's formats, read as ours: PEFT's folders and NumPy archives."""

import stages.model  # noqa: F401  the BLAS comes before MLX
