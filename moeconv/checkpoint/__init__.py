"""What is on disk: safetensors headers, byte ranges, shards and the output directory. Knows nothing above it."""
