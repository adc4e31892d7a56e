"""Caches from what others have stored of a teacher."""
