"""Endpoints that speak OpenAI's protocol: completions or chat, texts in, texts with log-probs out."""
