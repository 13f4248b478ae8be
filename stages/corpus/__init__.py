"""Raw rows → train, valid and test.jsonl, without duplicates, every row accounted for."""
