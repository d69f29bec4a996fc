"""Recipes: the YAML file, what it may not do, and its run."""
