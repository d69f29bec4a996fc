"""The one pipeline: a Plan says every output tensor and where its bytes come from; one loop applies it."""
