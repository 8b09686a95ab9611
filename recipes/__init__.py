"""Recipes: how the models shipped with the package were made."""
