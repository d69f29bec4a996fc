"""What the tensors mean: model families as rows of data, and which dense family becomes which MoE family."""
