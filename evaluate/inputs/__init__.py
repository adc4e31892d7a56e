"""Models and evaluation sets."""
