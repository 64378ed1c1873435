"""The decoder: its layers, its configuration and its parameter groups."""
