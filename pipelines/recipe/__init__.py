"""Recipes: the steps of a TOML file."""
