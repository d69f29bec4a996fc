"""MEASURE for quantize: codes of least output error, chosen a layer at a time, as an overlay."""
