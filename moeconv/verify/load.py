"""Does transformers load a checkpoint strictly: no parameter left random, no tensor unused, no shape wrong?"""

from __future__ import annotations

import os
from typing import Any

import torch

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import escape, first_line
from moeconv.families.find import find_family
from moeconv.families.model import Model
from moeconv.families.packed import quantization
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.stream.silence import transformers_silenced
from moeconv.stream.skeleton import Loaded, Skeleton, auto_class
from moeconv.tensors import decode_weight, plain_names
from moeconv.verify.default_run import loaded_problem

_SHOWN = 5  # names of each kind of problem


def load_strict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the model with its Auto class, weights and all, run it on a few tokens with transformers' defaults, and
    report what transformers says of it.

    {ok, problems [sentences], missing [names], unexpected [names], mismatched [names]}. A checkpoint that moeconv
    packed is loaded with `moeconv.hf` registered. Raises InputError only when the directory is no checkpoint.
    """
    checkpoint = Checkpoint(path)
    stated = quantization(checkpoint.config)
    try:
        if stated is not None and "moeconv" in stated:
            import moeconv.hf  # noqa: F401  (registers the quantizer)
        with transformers_silenced():
            module, info = auto_class(find_family(checkpoint.config)).from_pretrained(
                str(checkpoint.path),
                dtype="auto",
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:
        # Whatever loading raises is the answer to the question.
        text = first_line(error)
        return {"ok": False, "problems": [text], "missing": [], "unexpected": [], "mismatched": []}
    names = {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(str(entry[0]) for entry in info["mismatched_keys"]),
    }
    problems = [f"{kind}: {_some(found)}" for kind, found in names.items() if found]
    problems += [escape(message) for message in info["error_msgs"][:_SHOWN]]
    if not problems and (problem := loaded_problem(checkpoint, module)):
        problems = [f"loads, and does not run: {problem}"]
    return {"ok": not problems, "problems": problems, **names}


def strict_problems(model: Model) -> list[str]:
    """What keeps transformers from loading the model strictly, found on the meta device from names and shapes alone."""
    skeleton = Skeleton(model, dtype=TORCH_DTYPES[model.dtype], device="meta")
    loaded = skeleton.load({name: _shaped(model, name) for name, _ in plain_names(model, beside=True)})
    problems = {
        "missing": _untied(skeleton, loaded),
        "unexpected": list(loaded.unexpected),
        "mismatched": list(loaded.mismatched),
    }
    return [f"{kind}: {_some(found)}" for kind, found in problems.items() if found]


def _shaped(model: Model, name: str) -> torch.Tensor:
    """A tensor of the disk without its bytes; a packed one is decoded for its shape."""
    ref = model.checkpoint.tensors.get(name)
    if ref is None or model.roles[name].part:
        return decode_weight(model, name).to("meta")
    return torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype], device="meta")


def _untied(skeleton: Skeleton, loaded: Loaded) -> list[str]:
    """Missing parameters that tying does not fill."""
    missing = set(loaded.missing)
    for target, source in skeleton.module.all_tied_weights_keys.items():
        if (target in missing) != (source in missing):
            missing -= {target, source}
    return sorted(missing)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(escape(name) for name in names[:_SHOWN]) + more
