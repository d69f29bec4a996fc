"""Chooses and fits the neurons of dense FFNs, from the weights of experts and on text."""
