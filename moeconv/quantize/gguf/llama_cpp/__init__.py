"""What llama.cpp calls families, tensors and hyperparameters, as data: one row per family, in files by vendor.

A family has a row only where llama.cpp computes what transformers computes. The row states the config values for which
that is so, and a model with other values is refused.
"""

from moeconv.quantize.gguf.llama_cpp.find import LLAMA_CPP, find_row, supported
from moeconv.quantize.gguf.llama_cpp.names import is_float32
from moeconv.quantize.gguf.llama_cpp.record import Constant, LlamaCpp
from moeconv.quantize.gguf.llama_cpp.tensors import GgufTensor, written

__all__ = ["LLAMA_CPP", "Constant", "GgufTensor", "LlamaCpp", "find_row", "is_float32", "supported", "written"]
