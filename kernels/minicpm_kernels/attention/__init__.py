"""Causal attention over packed documents, and decoding attention."""
