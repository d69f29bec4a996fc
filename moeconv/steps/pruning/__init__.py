"""The prune step, from evidence to the written model."""
