"""``minicpm-edge quickstart``: the whole way, on text that every machine has."""
