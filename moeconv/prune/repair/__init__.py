"""Measurements for repairs of a prune: kept experts are refitted or merged, and pruned variants run beside the
model."""
