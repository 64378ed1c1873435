"""The decoder: its layers, its configuration and the rules that scale it."""
