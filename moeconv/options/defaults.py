"""Default values that help texts state, and that the code takes from here."""

from __future__ import annotations

# one place for each default, so that a help text cannot state another value than the code uses
TOKENS, SEQ_LEN = 65536, 512


EVALUATE_SEQ_LEN = 256


SAMPLE_TOKENS, LEAST_SAMPLE = 2048, 256  # per layer of a Mixture-of-Experts


NEURON_TOKENS = 16384  # per layer of a dense model


EXPERTS, TOP_K = 8, 2


LOOKS = 4


SCOPES = ("experts", "experts+shared", "all-linear", "all")
