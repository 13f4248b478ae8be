"""Our adapter, written in other people's formats, each file read back and compared with the adapter."""

import stages.model  # noqa: F401  the BLAS comes before MLX
