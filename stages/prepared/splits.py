"""The names of the splits, in the order in which they are written and shown."""

SPLITS = ("train", "valid", "test")
