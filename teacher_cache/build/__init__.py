"""Jobs that build a cache and its rounds."""
