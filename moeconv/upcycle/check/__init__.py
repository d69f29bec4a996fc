"""Does the written model compute what its source computes? Both are streamed and compared in a separate process."""
