"""Serving: an OpenAI-compatible API, a chat page and a terminal chat over one loaded model."""
