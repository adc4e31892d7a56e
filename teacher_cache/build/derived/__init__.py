"""Caches made from rows of other caches: merged and filtered ones."""
