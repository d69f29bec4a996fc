"""The token sample of a layer: for a few thousand tokens, the router logits and the outputs of every expert.

Outputs are kept as a random projection (Johnson-Lindenstrauss). Distances between sums of projected outputs, averaged
over the tokens, are those of the full outputs to about a percent, and their size does not depend on the hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.families.rule import Rule, explains, weights_of
from moeconv.randomness import generator
from moeconv.stream.experts import pair_outputs
from moeconv.stream.memory import release_memory
from moeconv.stream.need import PRODUCT_ROWS, sample_room
from moeconv.world import summed

SKETCH = 64  # dimensions of the projection; smaller outputs are kept as they are
_AGREE = 0.995  # the rule must explain the experts and weights of this share of the tokens
_CLOSE = 1e-2  # allowed error, relative to a token's largest weight; or the rounding error, if it is larger


@dataclass(frozen=True, eq=False)
class Tokens:
    """Sampled tokens of one layer: `hidden` [T, H], `logits` [T, E], the stock router's `index` and `weights` [T, k],
    and `scale` [T], the norm of the residual stream before the FFN. `rows` int64 [T] are their positions among the
    `total` sampled tokens of all processes."""

    hidden: Tensor
    logits: Tensor
    index: Tensor
    weights: Tensor
    scale: Tensor
    rows: Tensor
    total: int


def on_all_experts(
    experts: nn.Module, hidden: Tensor, matrix: Tensor, *, num_experts: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `hidden` [n, H] through every expert, multiplied by `weights` [n, E] if they are given. Returns (the cosines
    of the outputs of every two experts, summed over the tokens, float64 [E, E]; the outputs times `matrix` [H, P],
    float32 [n, E, P]). A zero output has the cosine 0."""
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=hidden.device)
    projected = torch.empty(len(hidden), num_experts, matrix.shape[1], device=hidden.device)
    by = matrix.to(hidden.device, torch.float32)
    every = torch.arange(num_experts, device=hidden.device)
    count, width = sample_room(num_experts, hidden.shape[1], sum(p.numel() for p in experts.parameters()))
    step = PRODUCT_ROWS * width // 4  # outputs in float16 are widened part by part
    room = torch.empty(
        num_experts * min(count, len(hidden)), hidden.shape[1], device=hidden.device,
        dtype=torch.float32 if width == 4 else torch.float16,
    )  # fmt: skip
    by_input = weights.split(count) if weights is not None else itertools.repeat(None)
    for chunk, sketch, factors in zip(hidden.split(count), projected.split(count), by_input):
        release_memory()
        token = torch.arange(len(chunk), device=hidden.device).repeat(num_experts)
        made = torch.empty(len(token), matrix.shape[1], device=hidden.device)
        units = room[: len(token)]
        on_input = None if factors is None else factors.T.reshape(-1)
        pairs = pair_outputs(experts, chunk, token, every.repeat_interleave(len(chunk)), weights=on_input)
        for rows, block in pairs:
            made[rows] = block.float() @ by
            units[rows] = nn.functional.normalize(block.float(), dim=-1, eps=1e-30)
        sketch.copy_(made.view(num_experts, len(chunk), -1).transpose(0, 1))
        for part in units.view(num_experts, len(chunk), -1).split(step, dim=1):
            wide = part.float().flatten(1)  # [E, n * H]
            total += (wide @ wide.T).double()
    return total, projected


def sample_fields(
    outputs: Tensor, tokens: Tokens, biases: Sequence[Tensor], rule: Rule | None, *, scale: Tensor | None = None
) -> dict[str, np.ndarray]:
    """The fields `sample_*` of artifact.py, gathered from all processes. They are empty if `rule` does not reproduce
    the stock router on these tokens, so that nothing is decided by a rule that the model does not follow.

    `outputs` [n, E, P] are the projected outputs of the experts. `scale` [E] are factors that the model applies to the
    routing weights after the rule; here they count as a part of the experts' outputs."""
    num_experts = outputs.shape[1]
    outputs = _gathered(outputs, tokens, torch.float32)
    logits = _gathered(tokens.logits, tokens)
    index, weights = _gathered(tokens.index, tokens).long(), _gathered(tokens.weights, tokens)
    if scale is not None:
        by = scale.double().cpu()
        weights, outputs = weights / by[index], outputs * by[None, :, None].float()
    bias = np.zeros(num_experts)
    for extra in biases:
        bias = bias + extra.double().reshape(-1).cpu().numpy()
    fields = {
        "sample_logits": logits.float().numpy(),
        "sample_scale": _gathered(tokens.scale, tokens).double().numpy(),
    }
    largest = float(outputs.abs().max()) or 1.0
    fields["sample_outputs"] = (outputs / largest).numpy().astype(np.float16)
    fields["sample_unit"] = np.array([largest])
    rounding = max(torch.finfo(t.dtype).eps for t in (tokens.hidden, tokens.logits, tokens.weights))
    picks = (index.numpy(), weights.numpy())
    factor = None if rule is None else _factor(rule, fields["sample_logits"], *picks, bias, rounding)
    if factor is None:
        return {}
    return fields | {"sample_bias": bias, "sample_factor": np.array([factor])}


def projection(width: int, *, layer: int) -> Tensor:
    """The projection matrix [H, P]: the identity for H up to 64, otherwise random, such that the expected squared norm
    of a projected unit vector is 1. It is the same in every run, so that samples of several runs can be joined."""
    if width <= SKETCH:
        return torch.eye(width, dtype=torch.float64)
    draw = generator(("sketch", layer)).standard_normal((width, SKETCH))
    return torch.from_numpy(draw / np.sqrt(SKETCH))


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The joined sample fields of several samples of one layer; empty if one of them has none."""
    if not all("sample_unit" in part for part in parts):
        return {}
    unit = max(float(part["sample_unit"][0]) for part in parts)
    fields = {name: np.concatenate([part[name] for part in parts]) for name in ("sample_logits", "sample_scale")}
    outputs = [part["sample_outputs"].astype(np.float32) * (part["sample_unit"][0] / unit) for part in parts]
    fields["sample_outputs"] = np.concatenate(outputs).astype(np.float16)
    factor = np.mean([part["sample_factor"] for part in parts], axis=0)
    return fields | {"sample_unit": np.array([unit]), "sample_bias": parts[0]["sample_bias"], "sample_factor": factor}


SAMPLE = ("sample_logits", "sample_outputs", "sample_scale", "sample_unit", "sample_bias", "sample_factor")


def _gathered(values: Tensor, tokens: Tokens, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rows of all processes, on the CPU in `dtype`."""
    whole = torch.zeros(tokens.total, *values.shape[1:], dtype=dtype)
    whole[tokens.rows] = values.to("cpu", dtype)
    return summed(whole)


def _factor(
    rule: Rule, logits: np.ndarray, index: np.ndarray, stock: np.ndarray, bias: np.ndarray, rounding: float
) -> float | None:
    """The factor between the stock weights `stock` [T, k] of the experts `index` and those of the rule (the routed
    scaling factor). None if the choice or the weights do not follow the rule. In 16 bits, logits of many tokens are
    equal or nearly equal, and the stock code may then choose any of these experts."""
    mine = weights_of(replace(rule, on_input=False), logits, index)
    if not mine.sum() > 0 or not np.isfinite(stock).all():
        return None
    factor = float(np.median(stock.sum(1) / np.maximum(mine.sum(1), 1e-20)))
    error = np.abs(stock - factor * mine).max(1) / np.maximum(np.abs(stock).max(1), 1e-20)
    fits = (error < max(_CLOSE, 4 * rounding)) & explains(rule, logits, index, bias=bias, rounding=rounding)
    if rule.on_input:  # its weights are in the outputs already, computed without a factor
        factor = 1.0 if abs(factor - 1) < max(_CLOSE, 4 * rounding) else np.nan
    return factor if fits.mean() >= _AGREE and np.isfinite(factor) else None
