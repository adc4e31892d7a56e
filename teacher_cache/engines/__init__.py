"""Engines that generate with the teacher and score text with it."""
