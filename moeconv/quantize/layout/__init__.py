"""How the experts of a model are arranged in tensors: the layout that a format needs, and the plan that writes it."""
