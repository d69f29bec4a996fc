"""Measurements for quantize: codes with the least output error, chosen layer by layer and written to an overlay."""
