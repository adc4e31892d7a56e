"""The command line, recipes, and what joins two packages."""
