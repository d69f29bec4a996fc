"""Shared by all commands that write a checkpoint: running a plan, and keeping what was measured before it."""
