"""Mistral AI: Mixtral."""

from __future__ import annotations

from dataclasses import replace

from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rows.llama import LLAMA

MIXTRAL: LlamaCpp = replace(LLAMA, names={})

ROWS = {"mixtral": MIXTRAL}
