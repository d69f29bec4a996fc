"""Is a converted model the same function as its source? Run as a process of its own, before the result is committed.

    python -m moeconv.upcycle.check.compare SOURCE_DIR STAGED_DIR [--tokens 128] [--seed 0] [--threads 1] [--dtype D]
        [--against]

Prints one JSON object: {max_abs_logit_diff, spread, relative, tokens, strict_load, problems, dtype, top_k, all_on,
default_run}, with --against also {counterpart}; on any failure {"error": "..."} with exit code 3, and {"of": "source"}
where it is the source that does not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint.paths import follow_links
from moeconv.errors import InputError, MoeconvError
from moeconv.families.model import Model, open_model
from moeconv.upcycle.counterpart import Counterpart, Forced


class SourceError(InputError):
    """The source itself does not run, so nothing can be said of what was made of it."""


def equivalence(
    source_dir: str | os.PathLike[str],
    staged_dir: str | os.PathLike[str],
    *,
    tokens: int = 128,
    seed: int = 0,
    threads: int | None = None,
    dtype: str = "float64",
    against: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare logits on random tokens (two sequences, from a Philox generator), both models streamed in `dtype`.

    Twice: at the top-k that config.json says, and with all experts on (`all_on`: {max_abs_logit_diff, relative,
    spread}, None where the family fixes top-k, or all are on already). Of a model that is not exact by design `against`
    says its exact counterpart (see upcycle/check/step.py): `counterpart` is then {max_abs_logit_diff, relative, spread,
    difference}, of the counterpart's logits and of the written tensors, `difference` None where they are its own.
    `default_run` is None where the staged model runs with transformers' own defaults, else what stops it.

    What is left between exact twins then comes from the parts that transformers keeps in float32 (norms, softmax).
    `spread` is the standard deviation of the source's logits and `relative` the largest difference over it. Where
    transformers does not load the staged model strictly, nothing is compared: `strict_load` is False, `problems` say
    why. Raises SourceError when the source does not run, InputError when the staged model does not, gives NaN, or the
    vocabularies differ.
    """
    import torch

    from moeconv.randomness import generator
    from moeconv.verify.default_run import streamed_problem
    from moeconv.verify.load import strict_problems

    if threads is not None:
        torch.set_num_threads(threads)
    source, staged = open_model(source_dir), open_model(staged_dir)
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
    logits = partial(_logits, ids=ids, dtype=getattr(torch, dtype))
    with _of_source():
        expected = logits(source)
    result: dict[str, Any] = _difference(expected, logits(staged))
    everything = None
    if _can_switch(staged):
        # a source that is a Mixture-of-Experts too is compared with all of its own on
        dense = logits(source, all_on=True) if _can_switch(source) else expected
        everything = _difference(dense, logits(staged, all_on=True))
    if against is not None:
        result["counterpart"] = _against(source, staged, against, expected, logits)
    problem = streamed_problem(staged)
    if problem is not None:
        with _of_source():
            if own := streamed_problem(source):
                raise InputError(own)
    about = {"tokens": int(ids.size), "strict_load": True, "problems": [], "dtype": dtype, "top_k": staged.top_k}
    return {**result, **about, "all_on": everything, "default_run": problem}


@contextlib.contextmanager
def _of_source() -> Iterator[None]:
    """Errors inside are the source's own."""
    try:
        yield
    except Exception as error:  # of transformers or torch, whatever the source makes them raise
        text = error.message if isinstance(error, MoeconvError) else f"{type(error).__name__}: {error}"
        raise SourceError(text) from error


def _logits(model: Model, *, ids: np.ndarray, dtype: Any, all_on: bool = False, forced: Forced | None = None) -> Any:
    """Logits [2, S, vocabulary]; `forced` gives every layer the pieces of one copy in place of what it chooses."""
    import torch

    from moeconv.stream.layers import LayerStream

    stream = LayerStream(model, ids, dtype=dtype, batch_size=2)
    wanted = forced.pieces if forced else _switch_all_on(stream) if all_on else model.top_k
    for layer in stream.layers():
        if forced and layer.experts is not None:
            layer.experts.register_forward_pre_hook(_forcing(forced, layer.index), with_kwargs=True)
        for batch in layer.batches():
            if batch.top_k_index is not None and batch.top_k_index.shape[-1] != wanted:
                raise InputError(f"layer {layer.index} routes to {batch.top_k_index.shape[-1]} experts, not {wanted}")
    result = torch.cat([part for _, part in stream.logits(batch_size=2)])
    if not torch.isfinite(result).all():
        raise InputError(f"the logits of {model.checkpoint.path.name} are NaN or infinite")
    return result


def _forcing(forced: Forced, layer: int) -> Callable[..., Any]:
    """A hook that gives a stock experts module the pieces of one copy, each at its exact share of the weights' sum."""
    import torch

    first = layer % forced.copies * forced.pieces

    def force(_module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        given: list[Any] = [*args, *kwargs.values()]
        hidden, index, weights = given[:3]
        pieces = torch.arange(first, first + forced.pieces, dtype=index.dtype).expand(len(index), -1)
        each = (weights.sum(-1, keepdim=True) / forced.scale).expand(-1, forced.pieces)
        return (hidden, pieces.contiguous(), each.contiguous(), *given[3:]), {}

    return force


def _against(
    source: Model, staged: Model, against: Mapping[str, Any], expected: Any, logits: Callable[..., Any]
) -> dict[str, Any]:
    from moeconv.upcycle.check.counterpart import first_difference, make_counterpart

    said = Counterpart.from_json(against["counterpart"])
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        made = make_counterpart(
            source, staged, said, Path(folder), siblings=against["siblings"], partition=against["partition"]
        )
        figures = _difference(expected, logits(made.run, forced=said.forced))
        return {**figures, "difference": first_difference(made, staged, said)}


def _can_switch(model: Model) -> bool:
    """Whether more experts can be on than top-k says."""
    rule = model.family.experts.routing
    return rule is not None and rule.top_k is None and model.top_k < model.num_experts


def _switch_all_on(stream: Any) -> int:
    """Every router's top-k set to all experts (and to all groups, where it has them). Returns how many those are."""
    from moeconv.stream.masking import top_k_places

    modules = list(stream.skeleton.module.modules())
    for at, name in top_k_places(modules, stream.model.family.experts.top_k):
        setattr(at, name, stream.model.num_experts)
    for module in modules:
        if type(getattr(module, "topk_group", None)) is int:
            module.topk_group = module.num_group
    return stream.model.num_experts


def _difference(expected: Any, found: Any) -> dict[str, float]:
    """How far logits are from what is expected, absolutely and in units of the spread."""
    if expected.shape != found.shape:
        raise InputError(f"the source predicts {expected.shape[-1]} tokens, the result {found.shape[-1]}")
    difference, spread = float((found - expected).abs().max()), float(expected.double().std())
    smallest = float(np.finfo(np.float32).tiny)
    return {"max_abs_logit_diff": difference, "spread": spread, "relative": difference / max(spread, smallest)}


def main(arguments: list[str] | None = None) -> int:
    """The command: JSON on stdout, everything else on stderr."""
    parser = argparse.ArgumentParser(prog="python -m moeconv.upcycle.check.compare")
    parser.add_argument("source_dir", metavar="source")
    parser.add_argument("staged_dir", metavar="staged")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--against", action="store_true", help="standard input says the exact counterpart, as JSON")
    parser.add_argument("--follow-links", action="store_true")
    given = vars(parser.parse_args(arguments))
    try:
        given["against"] = json.load(sys.stdin) if given["against"] else None
        with follow_links(given.pop("follow_links")), contextlib.redirect_stdout(sys.stderr):
            result = equivalence(**given)
    except Exception as error:
        # The parent reads JSON whatever happens here: it has a staged model to commit or discard.
        known = isinstance(error, MoeconvError)
        text = error.message if isinstance(error, MoeconvError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"error": text[:1000]} | ({"of": "source"} if isinstance(error, SourceError) else {})))
        if not known and os.environ.get("MOECONV_DEBUG") == "1":
            raise
        return InputError.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
