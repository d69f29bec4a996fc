"""Pack and unpack quantized weights, with one file per layout: pure tensor functions over blocks that stay in the
cache.

The bytes of every layout are equal to those of its own library.
"""

from moeconv.plan.kernels.pack.common import relative_rms
from moeconv.plan.kernels.pack.fourbit import decode_4bit, pack_nf4, read_quant_state, unnest_absmax, unpack_nf4
from moeconv.plan.kernels.pack.integer import (
    fitted_scales,
    int_scales,
    pack_int,
    pack_words,
    quantize_int,
    unpack_int,
    unpack_words,
)
from moeconv.plan.kernels.pack.rowwise import decode_int8_rowwise, pack_int8_rowwise, unpack_int8_rowwise

__all__ = [
    "decode_4bit",
    "decode_int8_rowwise",
    "fitted_scales",
    "int_scales",
    "pack_int",
    "pack_int8_rowwise",
    "pack_nf4",
    "pack_words",
    "quantize_int",
    "read_quant_state",
    "relative_rms",
    "unnest_absmax",
    "unpack_int",
    "unpack_int8_rowwise",
    "unpack_nf4",
    "unpack_words",
]
