"""The OpenAI-compatible API: requests, responses, streaming, errors, security."""
