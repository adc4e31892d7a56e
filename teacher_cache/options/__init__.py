"""Options of the commands that build, check and serve a cache."""
