"""The layer stream: runs a checkpoint of any size layer by layer, with the stock modules of transformers."""
