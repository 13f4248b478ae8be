"""Other people's file formats: PEFT, NumPy and GGUF. Each export is read back and compared with what it came from."""

import stages.model  # noqa: F401  the BLAS comes before MLX
