"""Files, folders and data sets of any supported kind → raw rows, each with its place."""
