"""minicpm-edge: from text to a small language model that answers on its owner's laptop or phone."""

# Importing this costs nothing: `load` imports what a model needs when it is called. It is bound here, at once, because
# the function bears its module's name: bound later, either could hide the other.
from minicpm_edge.load import load

__all__ = ["load"]
