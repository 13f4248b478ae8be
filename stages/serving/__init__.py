"""A loaded model that answers users: models by name, conversations, the HTTP server."""

import stages.model  # noqa: F401  the BLAS comes before MLX
