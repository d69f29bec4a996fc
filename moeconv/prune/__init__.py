"""Decide which experts go: a criterion and what it needs in, a Plan out."""
