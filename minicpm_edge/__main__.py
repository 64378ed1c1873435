"""``python -m minicpm_edge``."""

from minicpm_edge.cli.main import entry

if __name__ == "__main__":
    entry()
