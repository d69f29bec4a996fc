"""Decide how experts are packed: a format and a scheme in, a Plan with exact sizes out."""
