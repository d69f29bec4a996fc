"""What a calibration runs, known from the headers before any weight is read. Imports no torch."""

from __future__ import annotations

from moeconv.data.windows import sequence_length
from moeconv.families.model import Model
from moeconv.options import LEAST_SAMPLE, SAMPLE_TOKENS, SEQ_LEN, TOKENS, MeasureOptions
from moeconv.stream.need import Workload, WorkloadFields

_COST = 4  # the sample may cost this many times the work of the routed tokens


def sample_size(tokens: int, *, top_k: int, num_experts: int) -> int:
    """The number of tokens in the default sample: 2048, or fewer where running these through all experts would cost
    more than four times what running `tokens` tokens through `top_k` experts costs; at least 256."""
    return min(SAMPLE_TOKENS, max(LEAST_SAMPLE, _COST * tokens * top_k // max(1, num_experts)))


def sampled_fields(model: Model, sample: int) -> WorkloadFields:
    """What statistics of `sample` sampled tokens add to a workload: prediction layers have activations of their own."""
    return {"sample": sample, "flows": 1 + bool(model.mtp_layers)}


def run_of(model: Model, measure: MeasureOptions, *, sample_tokens: int | None) -> Workload:
    """What is run if the data has as many tokens as are asked for."""
    length = sequence_length(model, measure.seq_len, default=SEQ_LEN)
    tokens = measure.tokens or TOKENS
    if not model.moe_layers:
        return Workload(tokens, length, measure.batch_size)
    sample = sample_tokens or sample_size(tokens, top_k=model.top_k, num_experts=model.num_experts)
    return Workload(tokens, length, measure.batch_size, **sampled_fields(model, min(sample, tokens)))
