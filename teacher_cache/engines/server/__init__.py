"""vLLM behind its HTTP server."""
