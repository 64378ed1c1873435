"""Recipes: their schema, their files, and when two train the same model."""
