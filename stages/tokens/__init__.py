"""Token rows ↔ Parquet files."""
