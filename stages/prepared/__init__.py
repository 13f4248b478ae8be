"""What passes from prepare to tokenize: rows of data/prepared, and the count of what became of each."""
