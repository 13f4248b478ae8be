"""All that a run made → one page that needs no network."""
