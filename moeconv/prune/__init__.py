"""Decides which experts are removed: takes a criterion and what it needs, and makes a Plan."""
