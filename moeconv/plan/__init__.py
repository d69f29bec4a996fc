"""The one pipeline: a plan lists every output tensor and the source of its bytes, and one loop applies it."""
