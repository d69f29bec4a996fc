"""MEASURE for prune: kept experts refitted or merged, and pruned variants run beside the model."""
