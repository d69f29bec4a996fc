"""The layer stream: a checkpoint of any size, run a decoder layer at a time by the stock modules."""
