"""A run's files → one page that shows them all, and needs no network."""
