"""Token rows ↔ Parquet."""
