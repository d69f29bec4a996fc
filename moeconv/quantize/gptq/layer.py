"""Chooses the codes of one layer's experts with data. Of several methods, the one with the least error on held-out
tokens is kept, and round-to-nearest if none is clearly better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.contract import CodesLayer
from moeconv.data import heldout
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.awq import NO_FACTORS, CannotFoldError, Factors, awq_codes
from moeconv.quantize.gptq.choose import gptq_codes
from moeconv.quantize.gptq.experts import squared_norms
from moeconv.quantize.gptq.fold import folded
from moeconv.quantize.gptq.grids import as_planned, nearest_on_disk
from moeconv.quantize.gptq.groups import Group, role_of, weight_name
from moeconv.quantize.gptq.need import exponents_of
from moeconv.quantize.gptq.work import ExpertInputs, LayerWork, Parts, Target
from moeconv.quantize.spec import FOLDING, TRIED

_TOKENS_PER_COLUMN = 4  # per input column of the experts: with fewer, the codes follow the text and do not generalise
Put = Callable[[Parts], None]
Decode = Callable[[Item, Parts], Tensor]  # the tensors of a packed weight -> the weight, float32 [out, in]


@dataclass(frozen=True, eq=False)
class _Choice:
    """The result of one method for a layer: the squared error per held-out token, the tensors to write, and the factors
    of AWQ. Without tensors, every weight is rounded to nearest."""

    method: str
    squares: Tensor
    packed: Sequence[Parts] = ()
    factors: Factors = NO_FACTORS

    @property
    def error(self) -> float:
        return float(self.squares.sum())


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """The codes of one layer by `method`, a value of --method that uses data. `decode` decodes packed weights."""

    work: LayerWork
    method: str
    decode: Decode

    def run(self, put: Put) -> CodesLayer:
        """Choose the codes of all experts and pass them to `put`. Then compute the layer with the chosen weights, so
        that the next layer reads the activations of the quantized model. The layer keeps round-to-nearest if the chosen
        codes are not clearly better on held-out tokens. With too few tokens to choose codes with, it chooses none.

        Of several methods, the one with the least error on held-out tokens is kept.
        Raises InputError for weights that are not finite.
        """
        work, seen = self.work, self.work.inputs()
        target = work.target(seen, seen.held.nonzero().flatten())
        pool = work.target(seen, seen.pool if self.method in FOLDING else seen.pool[:0])
        gates, downs = work.groups(seen)
        work.round((*gates, *downs))
        nearest = _Choice("rtn", work.squares(seen, target))
        counts = [len(s.rows) for s in seen.tokens.values()]
        tokens, needed = sum(counts) / len(counts), self._tokens_needed()
        best, last, errors = nearest, nearest, {"rtn": _relative(nearest, target)}
        if tokens >= needed:
            for method in self._tried():
                try:
                    packed, factors = self._made(method, seen, pool, gates, downs)
                except CannotFoldError:
                    if method == self.method:
                        raise
                    continue
                last = _Choice(method, work.squares(seen, target), packed, factors)
                errors[method] = _relative(last, target)
                best = last if self._better(last, best) else best
                if last is not best:
                    last = _Choice(method, last.squares)
        self._put_back(best, last, gates, downs)
        self._write(best, put)
        for _ in work.layer.batches():  # computes the inputs of the next layer
            pass
        return {
            "layer": work.layer.index,
            "output_rms": errors[best.method],
            "output_rms_rtn": errors["rtn"],
            "output_rms_gptq": errors.get("gptq"),
            "output_rms_by_method": errors,
            "method": best.method,
            "folded": best.factors.folded,
            "kept": best.method != "rtn",
            "fewest_tokens": min(counts),
            "tokens_per_expert": tokens,
            "tokens_needed": needed,
        }

    def _tried(self) -> list[str]:
        """The methods to try. auto includes `mse` only for formats whose kernel searches scales."""
        fits = any(last_stage(item).params.get("fit") for item in self.work.items)
        return [m for m in TRIED.get(self.method, (self.method,)) if m != "mse" or fits]

    def _better(self, new: _Choice, best: _Choice) -> bool:
        if self.method in TRIED:
            return new.error < best.error
        return heldout.clearly_less(new.squares, best.squares)

    def _made(
        self, method: str, seen: ExpertInputs, pool: Target, gates: Sequence[Group], downs: Sequence[Group]
    ) -> tuple[Sequence[Parts], Factors]:
        """What a method chooses: the tensors to write, and factors. The resulting weights are then in the experts."""
        if method == "awq":
            return awq_codes(self.work, seen, pool, gates, downs)
        if method == "gptq":
            return gptq_codes(self.work, seen, gates, downs), NO_FACTORS
        packed = [as_planned(item, self.work.model.checkpoint) for item in self.work.items]
        self._put(packed, NO_FACTORS)
        return packed, NO_FACTORS

    def _tokens_needed(self) -> int:
        """The number of tokens per expert that are needed to choose codes. The experts share the second moment of the
        layer's tokens, so an expert needs only its share of them."""
        model = self.work.model
        return math.ceil(_TOKENS_PER_COLUMN * model.expert_dimension * model.top_k / model.num_experts)

    # -- the chosen codes --------------------------------------------------------------------------------------------

    def _put_back(self, best: _Choice, last: _Choice, gates: Sequence[Group], downs: Sequence[Group]) -> None:
        """Put the weights of the best method into the experts, which hold those of the method tried last."""
        if best.method == last.method:
            return
        if best.packed:
            self._put(best.packed, best.factors)
        else:
            self.work.round((*gates, *downs))

    def _put(self, packed: Sequence[Parts], factors: Factors) -> None:
        """Put the decoded weights of packed tensors into the experts, with the factors divided out again."""
        written = {name: tensor for parts in packed for name, tensor in parts.items()}
        for item in self.work.items:
            weight = self.decode(item, {spec.name: written[spec.name] for spec in item.outputs})
            self.work.experts.put({weight_name(item): self._unfolded(item, weight, factors)})

    def _unfolded(self, item: Item, weight: Tensor, factors: Factors) -> Tensor:
        """A decoded weight [out, in] without the factors of its columns and rows."""
        role = role_of(self.work.view, item)
        weight = weight.to(self.work.stream.device)
        inner = factors.inner.get(int(role.expert or 0))
        if role.key == "expert.down":
            return weight if inner is None else weight / inner
        if role.key == "expert.up" and inner is not None:
            weight = weight * inner[:, None]
        return weight if factors.norm is None else weight / factors.norm

    def _write(self, best: _Choice, put: Put) -> None:
        """Pass on the tensors of the layer: the codes, what the factors are folded into, and the exponents of these."""
        checkpoint = self.work.model.checkpoint
        for parts in best.packed or (nearest_on_disk(item, checkpoint) for item in self.work.items):
            put(parts)
        norm = best.factors.norm
        for item in self.work.beside:
            put(as_planned(item, checkpoint) if norm is None else folded(self.work, item, norm))
        for name, exponents in self._exponents(best.factors):
            put({name: exponents})

    def _exponents(self, factors: Factors) -> Iterator[tuple[str, Tensor]]:
        """The exponents of the factors, int8, by the names of `exponents_of`; none where no method uses factors."""
        if self.method not in FOLDING:
            return
        for name, role, width in exponents_of(self.work.view, (*self.work.beside, *self.work.items)):
            found = factors.norm if role.expert is None else factors.inner.get(role.expert)
            exponents = torch.zeros(width) if found is None else found.log2()
            yield name, exponents.round().to(torch.int8).cpu()


def _relative(choice: _Choice, target: Target) -> float:
    """sqrt(sum of squared errors / sum of the squared outputs)."""
    norm = float(squared_norms(target.outputs).sum())
    return (choice.error / norm) ** 0.5 if norm else 0.0
