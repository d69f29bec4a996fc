"""Is the written model its source's function? Both are streamed and compared in a process of their own."""
