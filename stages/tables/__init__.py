"""Tables that one stage hands to another, as Parquet files."""
