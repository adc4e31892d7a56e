"""Training rows from a cache, a round, plain data or a corpus."""
