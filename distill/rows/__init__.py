"""Training rows from a cache, a round, instruction data or a text corpus."""
