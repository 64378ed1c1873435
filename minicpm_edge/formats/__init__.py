"""Model files: checkpoints, weight names, GGUF headers, and what a MODEL argument names."""
