"""Rows of data/prepared, which pass from prepare to tokenize, and the ledger that counts them."""
