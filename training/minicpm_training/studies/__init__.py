"""Studies of the recipe itself."""
