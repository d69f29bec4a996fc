"""Recipes: the YAML file, the checks before it runs, and its run."""
