"""What measuring statistics takes, from the headers, before a weight is read. Imports no torch."""

from __future__ import annotations

from moeconv.data.windows import sequence_length
from moeconv.families.model import Model
from moeconv.options import LEAST_SAMPLE, SAMPLE_TOKENS, SEQ_LEN, TOKENS, MeasureOptions
from moeconv.stream.need import Workload

_COST = 4  # how often the work of routing may be spent on it


def sample_size(tokens: int, *, top_k: int, num_experts: int) -> int:
    """Tokens of the default sample: 2048, or as many as cost all experts four times what routing `tokens` does to
    `top_k` of them, but 256 at least."""
    return min(SAMPLE_TOKENS, max(LEAST_SAMPLE, _COST * tokens * top_k // max(1, num_experts)))


def run_of(model: Model, measure: MeasureOptions, *, sample_tokens: int | None) -> Workload:
    """What is run, where the data fills the tokens that are asked for."""
    length = sequence_length(model, measure.seq_len, default=SEQ_LEN)
    tokens = measure.tokens or TOKENS
    if not model.moe_layers:
        return Workload(tokens, length, measure.batch_size)
    sample = sample_tokens or sample_size(tokens, top_k=model.top_k, num_experts=model.num_experts)
    return Workload(tokens, length, measure.batch_size, sample=min(sample, tokens))
