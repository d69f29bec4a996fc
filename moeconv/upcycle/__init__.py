"""Decide how a dense checkpoint becomes a Mixture-of-Experts: headers and parameters in, a Plan out."""
