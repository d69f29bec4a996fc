"""The layouts of compressed-tensors, with one file per layout; compressed_tensors.py makes one format of them."""
