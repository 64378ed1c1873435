"""One recipe at several sizes."""

from __future__ import annotations

from typing import Literal

from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import with_settings
from minicpm_training.recipe.schema import Recipe

# muP: the paper's (table 7). Standard: the same initial values and learning rate at every width, for comparison.
Rules = Literal["mup", "standard"]


def sized(
    recipe: Recipe, *, width: int | None = None, depth: int | None = None, rules: Rules = "mup"
) -> Recipe:
    """The recipe with a model of another width (in the base's proportions and head dim) or depth.

    Raises:
        UserError: for a width that is not a multiple of the head dim, and for a recipe that starts from a checkpoint.
    """
    if recipe.init is not None:
        raise UserError("a study of sizes needs a recipe of its own shape: leave [init] out")
    base = recipe.model.config()
    settings: dict[str, object] = {}
    if width is not None:
        if width % base.head_dim:
            raise UserError(f"width {width} is not a multiple of the head dim {base.head_dim}")
        heads = width // base.head_dim
        group = base.num_attention_heads // base.num_key_value_heads
        settings |= {
            "model.hidden_size": width,
            "model.intermediate_size": 8
            * max(1, round(base.intermediate_size * width / base.hidden_size / 8)),
            "model.num_attention_heads": heads,
            "model.num_key_value_heads": heads // group if heads % group == 0 else heads,
        }
    if depth is not None:
        settings["model.num_hidden_layers"] = depth
    if rules == "standard":
        settings["model.dim_model_base"] = float(width or base.hidden_size)
    return with_settings(recipe, settings)


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed, of weights and of the order of data alike."""
    return with_settings(recipe, {"seed": recipe.seed + seed})
