"""Comparing an export with the model it came from."""
