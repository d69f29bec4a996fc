"""Looking at checkpoints: what one is, whether its bytes and structure are what they should be."""
