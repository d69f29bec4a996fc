"""Does a converted model compute what its source computes? Run as a separate process, before the result is committed.

    python -m moeconv.upcycle.check.compare SOURCE_DIR [STAGED_DIR] [--tokens 128] [--seed 0] [--threads 1] [--dtype D]
        [--against]

Prints one JSON object: {max_abs_logit_diff, spread, relative, tokens, strict_load, problems, dtype, top_k, all_on,
default_run}, with --against also {counterpart}; on any failure {"error": "..."} with exit code 3, and {"of": "source"}
where the source itself does not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moeconv.checkpoint.paths import follow_links
from moeconv.contract import Counterpart, Difference
from moeconv.errors import InputError, MoeconvError
from moeconv.families.model import Model, open_model
from moeconv.types import JsonObject
from moeconv.upcycle.counterpart import ExactCounterpart, Forced
from moeconv.upcycle.stock import stock_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moeconv.stream.layers import LayerStream


Choices = dict[int, tuple["Tensor", "Tensor"]]  # layer -> the chosen experts and their weights, [T, k]


@dataclass(frozen=True, eq=False)
class Replayed:
    """The choices of the source, to be computed by copies: expert e of a layer has copies[layer][e] adjacent copies."""

    choices: Choices
    copies: Mapping[str, Sequence[int]]


class SourceError(InputError):
    """The source itself does not run, so that nothing can be compared with it."""


class Logits(Protocol):
    """Logits [2, S, vocabulary] of a model on the tokens of the comparison."""

    def __call__(
        self,
        model: Model,
        *,
        all_on: bool = False,
        forced: Forced | None = None,
        replayed: Replayed | None = None,
        record: Choices | None = None,
    ) -> Tensor: ...


def equivalence(
    source_dir: str | os.PathLike[str],
    staged_dir: str | os.PathLike[str],
    *,
    tokens: int = 128,
    seed: int = 0,
    threads: int | None = None,
    dtype: str = "float64",
    against: JsonObject | None = None,
) -> JsonObject:
    """Compare logits on random tokens (two sequences, from a Philox generator), both models streamed in `dtype`.

    They are compared twice: at the top-k of config.json, and with all experts on (`all_on`: {max_abs_logit_diff,
    relative, spread}; None where the family fixes top-k, and where all experts are on already). For a model that is not
    exact by design, `against` describes its exact counterpart (see upcycle/check/step.py). `counterpart` is then
    {max_abs_logit_diff, relative, spread, difference}: the counterpart's logits against the source's, and the first
    tensor of the written model that is not the counterpart's, or None. `default_run` is None where the staged model
    runs with transformers' own defaults, and otherwise the reason why it does not.

    `spread` is the standard deviation of the source's logits, and `relative` the largest difference as a share of it.
    What remains between models that are equal comes from the parts that transformers keeps in float32 (norms, softmax).
    Where transformers does not load the staged model strictly, nothing is compared: `strict_load` is False, and
    `problems` has the reasons.

    Raises SourceError when the source does not run; InputError when the staged model does not run or gives NaN, and
    when the vocabularies differ.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    original, staged = open_model(source_dir), open_model(staged_dir)
    with stock_model(original) as source:
        return _compare(
            original, source, staged, tokens=tokens, seed=seed, dtype=getattr(torch, dtype), against=against
        )


def _compare(
    original: Model, source: Model, staged: Model, *, tokens: int, seed: int, dtype: torch.dtype,
    against: JsonObject | None,
) -> JsonObject:  # fmt: skip
    """`equivalence` of opened models: `source` runs in the place of `original`."""
    from moeconv.randomness import generator
    from moeconv.verify.default_run import streamed_problem
    from moeconv.verify.load import strict_problems

    try:
        problems = strict_problems(staged)
    except Exception:
        with _of_source():
            strict_problems(source)
        raise
    if problems:
        with _of_source():
            if theirs := strict_problems(source):
                raise InputError("; ".join(theirs[:3]))
        nothing = dict.fromkeys(("max_abs_logit_diff", "spread", "relative"))
        return {**nothing, "tokens": 0, "strict_load": False, "problems": problems}
    vocabulary = min(int(model.value("vocab_size")) for model in (source, staged))
    length = min(
        [max(2, tokens // 2), *(model.value("max_position_embeddings") or tokens for model in (source, staged))]
    )
    ids = generator((seed, "equivalence")).integers(0, vocabulary, (2, length), dtype=np.int64)
    logits = partial(_logits, ids=ids, dtype=dtype)
    choices: Choices = {}
    with _of_source():
        expected = logits(source, record=choices)
    result: JsonObject = {**_difference(expected, logits(staged))}
    everything = None
    # more experts with the same top-k: with all on, some would count more often than others
    if _can_switch(staged) and not (source.family.kind == "moe" and source.top_k == staged.top_k):
        # where the source is a Mixture-of-Experts too, all of its experts are on as well
        dense = logits(source, all_on=True) if _can_switch(source) else expected
        everything = _difference(dense, logits(staged, all_on=True))
    if against is not None:
        result["counterpart"] = _against(original, staged, against, expected, logits, choices)
    problem = streamed_problem(staged)
    if problem is not None:
        with _of_source():
            if own := streamed_problem(source):
                raise InputError(own)
    about = {
        "tokens": int(ids.size),
        "strict_load": True,
        "problems": [],
        "dtype": str(dtype).removeprefix("torch."),
        "top_k": staged.top_k,
    }
    return {**result, **about, "all_on": everything, "default_run": problem}


_HookResult = tuple[tuple["Tensor", ...], dict[str, "Tensor"]]


def first_layer_runs(
    source_dir: str | os.PathLike[str], *, threads: int | None = None, dtype: str = "float64"
) -> JsonObject:
    """{"runs": True} where the stock class is built from the source's config.json, has the names of its tensors, and
    runs the first layer: a part of what `equivalence` runs, in seconds whatever the model's depth. Raises SourceError
    elsewhere."""
    import torch

    from moeconv.stream.layers import LayerStream
    from moeconv.verify.load import strict_problems

    if threads is not None:
        torch.set_num_threads(threads)
    with _of_source(), stock_model(open_model(source_dir)) as source:
        if problems := strict_problems(source):
            raise InputError("; ".join(problems[:3]))
        stream = LayerStream(source, np.zeros((1, 2), np.int64), dtype=getattr(torch, dtype), batch_size=1)
        for _ in next(iter(stream.layers())).batches():
            pass
    return {"runs": True}


@contextlib.contextmanager
def _of_source() -> Iterator[None]:
    """Turns any error inside into a SourceError."""
    try:
        yield
    except Exception as error:  # of transformers or torch, whatever the source makes them raise
        text = error.message if isinstance(error, MoeconvError) else f"{type(error).__name__}: {error}"
        raise SourceError(text) from error


def _logits(
    model: Model, *, ids: np.ndarray, dtype: torch.dtype, all_on: bool = False, forced: Forced | None = None,
    replayed: Replayed | None = None, record: Choices | None = None,
) -> Tensor:  # fmt: skip
    """Logits [2, S, vocabulary] for `ids` int64 [2, S]. With `forced`, every layer computes the pieces of one copy
    instead of the experts that its router chooses, and with `replayed` copies of those that the source chose. `record`
    gets what the router chooses."""
    import torch

    from moeconv.stream.layers import LayerStream

    stream = LayerStream(model, ids, dtype=dtype, batch_size=2)
    wanted = forced.pieces if forced else _switch_all_on(stream) if all_on else model.top_k
    for layer in stream.layers():
        if forced and layer.experts is not None:
            layer.experts.register_forward_pre_hook(_forcing(forced, layer.index), with_kwargs=True)
        if replayed and layer.experts is not None and layer.index in replayed.choices:
            layer.experts.register_forward_pre_hook(_replaying(replayed, layer.index), with_kwargs=True)
        for batch in layer.batches():
            if record is not None and batch.top_k_index is not None and batch.top_k_weights is not None:
                record[layer.index] = batch.top_k_index, batch.top_k_weights
            if batch.top_k_index is not None and batch.top_k_index.shape[-1] != wanted:
                raise InputError(f"layer {layer.index} routes to {batch.top_k_index.shape[-1]} experts, not {wanted}")
    result = torch.cat([part for _, part in stream.logits(batch_size=2)])
    if not torch.isfinite(result).all():
        raise InputError(f"the logits of {model.checkpoint.path.name} are NaN or infinite")
    return result


def _forcing(forced: Forced, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], _HookResult]:
    """A hook that makes a stock experts module compute the pieces of one copy, each with its exact share of the sum of
    the weights. Layers take turns among the copies, so that each copy is compared somewhere."""
    import torch

    first = layer % forced.copies * forced.pieces

    def force(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> _HookResult:
        given = [*args, *kwargs.values()]
        hidden, index, weights = given[:3]
        pieces = torch.arange(first, first + forced.pieces, dtype=index.dtype).expand(len(index), -1)
        each = (weights.sum(-1, keepdim=True) / forced.scale).expand(-1, forced.pieces)
        return (hidden, pieces.contiguous(), each.contiguous(), *given[3:]), {}

    return force


def _replaying(
    replayed: Replayed, layer: int
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], _HookResult]:
    """A hook that makes a stock experts module compute the source's choice, where tokens take turns among the copies of
    an expert."""
    import torch

    chosen, given_weights = replayed.choices[layer]
    count = torch.tensor(replayed.copies[str(layer)])
    first = count.cumsum(0) - count

    def replay(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> _HookResult:
        given = [*args, *kwargs.values()]
        hidden, index, weights = given[:3]
        old = chosen.to(count.device)
        copy = torch.arange(len(old))[:, None] % count[old]
        return (hidden, (first[old] + copy).to(index), given_weights.to(weights), *given[3:]), {}

    return replay


def _against(
    source: Model, staged: Model, against: JsonObject, expected: Tensor, logits: Logits, choices: Choices
) -> Counterpart:
    """The exact counterpart, made in memory, against the source's logits and the staged model's tensors."""
    from moeconv.upcycle.check.counterpart import first_difference, make_counterpart

    exact = ExactCounterpart.from_json(against["counterpart"])
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        made = make_counterpart(
            source, staged, exact, Path(folder), siblings=against["siblings"], partition=against["partition"]
        )
        replayed = None if exact.copies is None or staged.weighs_inputs else Replayed(choices, exact.copies)
        found = expected if exact.copies is not None and replayed is None else logits(
            made.run, forced=exact.forced, replayed=replayed
        )  # fmt: skip
        figures = _difference(expected, found)
        return {**figures, "difference": first_difference(made, staged, exact)}


def _can_switch(model: Model) -> bool:
    """Whether more experts than top-k can be on."""
    rule = model.family.experts.routing
    return rule is not None and rule.top_k is None and model.top_k < model.num_experts


def _switch_all_on(stream: LayerStream) -> int:
    """Sets the top-k of every router to all experts, and to all groups where it has groups. Returns the number of
    experts."""
    from moeconv.stream.masking import top_k_places

    modules = list(stream.skeleton.module.modules())
    for at, name in top_k_places(modules, stream.model.family.experts.top_k):
        setattr(at, name, stream.model.num_experts)
    for module in modules:
        if type(getattr(module, "topk_group", None)) is int:
            module.topk_group = module.num_group
    return stream.model.num_experts


def _difference(expected: Tensor, found: Tensor) -> Difference:
    """The largest difference of the logits from the expected ones, absolute and as a share of their spread."""
    if expected.shape != found.shape:
        raise InputError(f"the source has logits of {expected.shape[-1]} tokens and the result of {found.shape[-1]}")
    difference, spread = float((found - expected).abs().max()), float(expected.double().std())
    smallest = float(np.finfo(np.float32).tiny)
    return {"max_abs_logit_diff": difference, "spread": spread, "relative": difference / max(spread, smallest)}


def main(arguments: list[str] | None = None) -> int:
    """The command: JSON on stdout, everything else on stderr."""
    parser = argparse.ArgumentParser(prog="python -m moeconv.upcycle.check.compare")
    parser.add_argument("source_dir", metavar="source")
    parser.add_argument(
        "staged_dir", metavar="staged", nargs="?", help="left out: only the source's first layer is run"
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--against", action="store_true", help="read the exact counterpart, as JSON, from stdin")
    parser.add_argument("--follow-links", action="store_true")
    given = vars(parser.parse_args(arguments))
    try:
        given["against"] = json.load(sys.stdin) if given["against"] else None
        with follow_links(given.pop("follow_links")), contextlib.redirect_stdout(sys.stderr):
            if given["staged_dir"] is None:
                result = first_layer_runs(given["source_dir"], threads=given["threads"], dtype=given["dtype"])
            else:
                result = equivalence(**given)
    except Exception as error:
        # The parent process reads JSON whatever happens here: it has a staged model to commit or to discard.
        known = isinstance(error, MoeconvError)
        text = error.message if isinstance(error, MoeconvError) else f"{type(error).__name__}: {error}"
        found = {"error": text[:1000]} | ({"of": "source"} if isinstance(error, SourceError) else {})
        print(json.dumps(found | ({"hint": error.hint} if isinstance(error, MoeconvError) and error.hint else {})))
        if not known and os.environ.get("MOECONV_DEBUG") == "1":
            raise
        return InputError.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
