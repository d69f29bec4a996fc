"""What --data names, as windows of tokens."""
