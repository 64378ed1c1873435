"""GGUF for llama.cpp."""
