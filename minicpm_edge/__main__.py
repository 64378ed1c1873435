"""``python -m minicpm_edge``."""

from minicpm_edge.cli import entry

if __name__ == "__main__":
    entry()
