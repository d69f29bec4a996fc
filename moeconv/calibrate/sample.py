"""The token sample of a layer: on a few thousand tokens the router's logits, and what every expert would give.

Outputs are kept as a random projection (Johnson-Lindenstrauss): distances between sums of them, averaged over the
tokens, are those of the full outputs to about a percent, in a size that does not grow with the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.families.rule import Rule, explains, weights_of
from moeconv.randomness import generator
from moeconv.stream.experts import pair_outputs
from moeconv.stream.memory import release_memory
from moeconv.stream.need import PRODUCT_ROWS, sample_room
from moeconv.world import summed

SKETCH = 64  # dimensions of the projection; narrower outputs are kept whole
_AGREE = 0.995  # share of tokens whose experts and weights the rule must explain
_CLOSE = 1e-2  # of a token's largest weight, or what rounding makes where that is more


@dataclass(frozen=True, eq=False)
class Tokens:
    """Sampled tokens of one layer: `hidden` [T, H], `logits` [T, E], the stock router's `index` and `weights` [T, k],
    and `scale` [T], the norm of the residual stream in front of the FFN. `rows` are their places among `total`."""

    hidden: Tensor
    logits: Tensor
    index: Tensor
    weights: Tensor
    scale: Tensor
    rows: Tensor
    total: int


def on_all_experts(experts: nn.Module, hidden: Tensor, matrix: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """What every expert gives for `hidden` [n, H]: the sum over tokens of the cosine of two experts' outputs, float64
    [E, E], and the outputs times `matrix` [H, P], float32 [n, E, P]. A zero output has cosine 0 with everything."""
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=hidden.device)
    projected = torch.empty(len(hidden), num_experts, matrix.shape[1], device=hidden.device)
    by = matrix.to(hidden.device, torch.float32)
    every = torch.arange(num_experts, device=hidden.device)
    weights = sum(p.numel() for p in experts.parameters())
    count, width = sample_room(num_experts, hidden.shape[1], weights)
    step = PRODUCT_ROWS * width // 4  # a part is widened where it is held in float16
    room = torch.empty(
        num_experts * min(count, len(hidden)), hidden.shape[1], device=hidden.device,
        dtype=torch.float32 if width == 4 else torch.float16,
    )  # fmt: skip
    for chunk, sketch in zip(hidden.split(count), projected.split(count)):
        release_memory()
        token = torch.arange(len(chunk), device=hidden.device).repeat(num_experts)
        made = torch.empty(len(token), matrix.shape[1], device=hidden.device)
        units = room[: len(token)]
        for rows, block in pair_outputs(experts, chunk, token, every.repeat_interleave(len(chunk))):
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
    """The fields `sample_*` of artifact.py, gathered from all processes; none where `rule` does not reproduce what the
    stock router did on these tokens, so that nothing is decided by a rule that the model does not follow. `outputs`
    [n, E, P] are the experts', projected. `scale` [E] multiplies the weights behind the rule; it counts as a part of
    the experts' outputs."""
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
    """The matrix [H, P] that outputs are multiplied by: the identity up to P = 64, else random with unit expectation
    of the squared norm. The same in every run, so that samples add up."""
    if width <= SKETCH:
        return torch.eye(width, dtype=torch.float64)
    draw = generator(("sketch", layer)).standard_normal((width, SKETCH))
    return torch.from_numpy(draw / np.sqrt(SKETCH))


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sample fields of several samples of one layer together; none where one of them lacks them."""
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
    """The rows of all processes."""
    whole = torch.zeros(tokens.total, *values.shape[1:], dtype=dtype)
    whole[tokens.rows] = values.to("cpu", dtype)
    return summed(whole)


def _factor(
    rule: Rule, logits: np.ndarray, index: np.ndarray, stock: np.ndarray, bias: np.ndarray, rounding: float
) -> float | None:
    """What the stock weights `stock` [T, k] of the experts `index` are of the rule's (the routed scaling factor), or
    None when choice or weights are not the rule's. In 16 bits logits tie or nearly tie in many tokens, and the stock
    code may then choose any of them."""
    mine = weights_of(rule, logits, index)
    if not mine.sum() > 0 or not np.isfinite(stock).all():
        return None
    factor = float(np.median(stock.sum(1) / np.maximum(mine.sum(1), 1e-20)))
    error = np.abs(stock - factor * mine).max(1) / np.maximum(np.abs(stock).max(1), 1e-20)
    fits = (error < max(_CLOSE, 4 * rounding)) & explains(rule, logits, index, bias=bias, rounding=rounding)
    return factor if fits.mean() >= _AGREE else None
