"""Reads what --data names, and turns it into windows of tokens."""
