"""minicpm-edge: from text to a small language model that answers on its owner's laptop or phone."""
