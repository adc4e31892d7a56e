"""Scores of answers, and statistics over them."""
