"""Rows, templates, splits, tokens and masks, Parquet: everything before the model. Never imports MLX."""
