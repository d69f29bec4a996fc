"""`collapse`: one dense FFN per layer, made of the neurons of a layer's experts."""
