"""The options of `moeconv quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option
from moeconv.options.defaults import SCOPES

_FORMAT_WORDS = "moeconv.quantize.formats:help_words"


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `moeconv quantize` only."""

    format: str = option("compressed-tensors", "Layout on disk.", choices="moeconv.quantize.formats:FORMATS")
    scheme: str | None = option(
        None,
        "Number format (default: the format's first 4-bit scheme); mixed: bits per layer, in gguf per tensor.",
        choices="moeconv.quantize.formats:scheme_words", aliases="moeconv.quantize.formats:scheme_aliases",
    )  # fmt: skip
    bits: int | None = option(None, "{bits}: short for the format's usual scheme of that width.", words=_FORMAT_WORDS)
    group_size: str = option(
        "auto", "Weights per scale: auto, channel, or {group_sizes}.", words=_FORMAT_WORDS, metavar="N"
    )
    method: str = option(
        "rtn", "How codes are chosen: rtn rounds to nearest, mse searches for the scales with the least error; with "
        "--data: gptq, awq, or auto (the best method for each layer).", choices="moeconv.quantize.spec:METHODS",
    )  # fmt: skip
    average_bits: float | None = option(None, "mixed: bits per expert weight, scales included, such as 5.")
    among: str | None = option(
        None, "mixed: schemes to choose from, separated by commas (default: the format's schemes of 4 bits or more; "
        "for a smaller budget, all of them).", metavar="SCHEMES",
    )  # fmt: skip
    max_bytes: str | None = option(None, "mixed: largest size of the result, such as 20GB.", metavar="SIZE")
    stats: str | None = option(
        None, "mixed: statistics from `moeconv calibrate`, for the layers' importance.", reads="file"
    )
    split_size: str = option(
        "50GB", "gguf: largest size of one file; a larger model is split into several (-00001-of-00003.gguf).",
        metavar="SIZE", panel="Output",
    )  # fmt: skip
    file_name: str = option(
        "model", "gguf: file name without .gguf; {type} is replaced by the scheme: mine-{type} gives mine-Q8_0.gguf.",
        metavar="NAME", panel="Output",
    )  # fmt: skip
    modelfile: bool = option(
        False, "gguf: also write a Modelfile for ollama, with the model's sampling settings and stop strings.",
        panel="Output",
    )  # fmt: skip
    imatrix: str | None = option(
        None, "gguf: importance matrix, from `moeconv calibrate --imatrix` or llama.cpp.", reads="file"
    )
    damping: float = option(0.01, "gptq: added to the Hessian's diagonal, in units of its mean.")
    actorder: str = option(
        "static", "gptq: static quantizes the columns with the largest inputs first; none keeps the stored order.",
        choices=("static", "none"),
    )  # fmt: skip
    scope: str | None = option(
        None,
        "Weights to pack (default: experts). The router and norms are never packed, and embeddings and lm_head "
        "only with all, which is for GGUF.",
        choices=SCOPES,
    )
    rest: str | None = option(
        None, "Scheme for the linear layers that --scope leaves out: attention, shared experts, dense layers.",
        choices="moeconv.quantize.formats:rest_words", aliases="moeconv.quantize.formats:scheme_aliases",
    )  # fmt: skip
    target: tuple[str, ...] = option(
        (), "Runtime that must load the result: transformers, vllm, sglang or llama.cpp; repeatable.", metavar="RUNTIME"
    )
    self_contained: bool = option(
        False, "{self_contained}: write the loader's code beside the weights, for trust_remote_code=True without "
        "moeconv.", words=_FORMAT_WORDS,
    )  # fmt: skip
    double_quant: bool = option(False, "Quantize the scales too ({nesting}).", words=_FORMAT_WORDS)
    requantize: bool = option(
        False, "Accept a source that is already quantized (FP8, MXFP4, ...): each weight is decoded, then packed."
    )
