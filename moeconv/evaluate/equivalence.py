"""Is a converted model the same function as its source? Run as a process of its own, before the result is committed.

    python -m moeconv.evaluate.equivalence SOURCE_DIR STAGED_DIR [--tokens 128] [--seed 0] [--threads 1]

Prints one JSON object: {max_abs_logit_diff, spread, relative, tokens, strict_load, problems}; on any failure
{"error": "..."} with exit code 3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

import numpy as np

from moeconv.errors import InputError, MoeconvError


def equivalence(
    source_dir: str | os.PathLike[str],
    staged_dir: str | os.PathLike[str],
    *,
    tokens: int = 128,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Compare logits on random tokens (two sequences, from a Philox generator), both models streamed in float64.

    What is left between exact twins then comes from the parts that transformers keeps in float32 (norms, softmax).
    `spread` is the standard deviation of the source's logits and `relative` the largest difference over it. Where
    transformers does not load the staged model strictly, nothing is compared: `strict_load` is False, `problems` say
    why. Raises InputError when a model does not run, gives NaN, or the vocabularies differ.
    """
    import torch

    from moeconv.calibrate.stream import LayerStream
    from moeconv.evaluate.load import strict_problems
    from moeconv.families.model import Model, open_model
    from moeconv.plan.kernels.draw import generator

    if threads is not None:
        torch.set_num_threads(threads)
    source, staged = open_model(source_dir), open_model(staged_dir)
    if problems := strict_problems(staged):
        nothing = dict.fromkeys(("max_abs_logit_diff", "spread", "relative"))
        return {**nothing, "tokens": 0, "strict_load": False, "problems": problems}
    vocabulary = min(int(model.value("vocab_size")) for model in (source, staged))
    length = min(
        [max(2, tokens // 2), *(model.value("max_position_embeddings") or tokens for model in (source, staged))]
    )
    ids = generator((seed, "equivalence")).integers(0, vocabulary, (2, length), dtype=np.int64)

    def logits(model: Model) -> torch.Tensor:
        stream = LayerStream(model, ids, dtype=torch.float64, batch_size=2).run()
        result = torch.cat([part for _, part in stream.logits(batch_size=2)])
        if not torch.isfinite(result).all():
            raise InputError(f"the logits of {model.checkpoint.path.name} are NaN or infinite")
        return result

    expected, found = logits(source), logits(staged)
    if expected.shape != found.shape:
        raise InputError(f"the source predicts {expected.shape[-1]} tokens, the result {found.shape[-1]}")
    difference, spread = float((found - expected).abs().max()), float(expected.double().std())
    return {
        "max_abs_logit_diff": difference,
        "spread": spread,
        "relative": difference / max(spread, float(torch.finfo(torch.float32).tiny)),
        "tokens": int(ids.size),
        "strict_load": True,
        "problems": [],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command: JSON on stdout, everything else on stderr."""
    parser = argparse.ArgumentParser(prog="python -m moeconv.evaluate.equivalence")
    parser.add_argument("source")
    parser.add_argument("staged")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = equivalence(
                given.source, given.staged, tokens=given.tokens, seed=given.seed, threads=given.threads
            )
    except Exception as error:
        # The parent reads JSON whatever happens here: it has a staged model to commit or discard.
        known = isinstance(error, MoeconvError)
        text = error.message if isinstance(error, MoeconvError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"error": text[:1000]}))
        if not known and os.environ.get("MOECONV_DEBUG") == "1":
            raise
        return InputError.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
