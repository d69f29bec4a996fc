"""Checks that transformers loads a checkpoint strictly: no parameter left random, no unused tensor, no wrong shape."""

from __future__ import annotations

import os

import torch
from typing_extensions import TypedDict

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, Unsupported, escape, first_line
from moeconv.families.find import find_family
from moeconv.families.model import Model
from moeconv.families.packed import quantization
from moeconv.families.remote import stock_config
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.stream.silence import transformers_silenced
from moeconv.stream.skeleton import Loaded, Skeleton, auto_class
from moeconv.tensors import decode_weight, plain_names
from moeconv.verify.default_run import loaded_problem

_SHOWN = 5  # names per kind of problem


class StrictLoad(TypedDict):
    """The result of loading: `problems` are sentences, the other lists names of tensors."""

    ok: bool
    problems: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def load_strict(path: str | os.PathLike[str]) -> StrictLoad:
    """Load the whole model with its Auto class, and run it on a few tokens with the defaults of transformers.

    A checkpoint that moeconv packed is loaded with `moeconv.hf` registered. Raises InputError only if the directory is
    not a checkpoint, and Unsupported for a family whose class is code in it; whatever transformers raises is a problem
    in the result.
    """
    checkpoint = Checkpoint(path)
    _check_remote(checkpoint)
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
        text = first_line(error)
        return {"ok": False, "problems": [text], "missing": [], "unexpected": [], "mismatched": []}
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(map(str, info["unexpected_keys"]))
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    problems = _listed(missing, unexpected, mismatched)
    problems += [escape(message) for message in info["error_msgs"][:_SHOWN]]
    if not problems and (problem := loaded_problem(checkpoint, module)):
        problems = [f"loads, but does not run: {problem}"]
    return {
        "ok": not problems,
        "problems": problems,
        "missing": missing,
        "unexpected": unexpected,
        "mismatched": mismatched,
    }


def _check_remote(checkpoint: Checkpoint) -> None:
    """Raises Unsupported for a family whose class is code in the checkpoint."""
    try:
        family = find_family(checkpoint.config)
    except InputError:
        return  # transformers will say what it makes of it
    if family.remote is not None or family.runs_as is not None:
        stock_config(family, checkpoint.config)
        raise Unsupported(
            f"transformers loads {family.model_type} only with the code of the checkpoint, which moeconv never runs",
            hint="Verify it without --load. `moeconv evaluate` runs a class of transformers that computes the same.",
        )


def strict_problems(model: Model) -> list[str]:
    """What keeps transformers from loading the model strictly, found from names and shapes on the meta device."""
    skeleton = Skeleton(model, dtype=TORCH_DTYPES[model.dtype], device="meta")
    loaded = skeleton.load({name: _shaped(model, name) for name, _ in plain_names(model, beside=True)})
    return _listed(_untied(skeleton, loaded), list(loaded.unexpected), list(loaded.mismatched))


def _listed(missing: list[str], unexpected: list[str], mismatched: list[str]) -> list[str]:
    """One sentence per kind of problem, with the first names."""
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    return [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _shaped(model: Model, name: str) -> torch.Tensor:
    """A tensor on disk as a tensor on the meta device; a packed one is decoded to learn its shape."""
    ref = model.checkpoint.tensors.get(name)
    if ref is None or model.roles[name].part:
        return decode_weight(model, name).to("meta")
    return torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype], device="meta")


def _untied(skeleton: Skeleton, loaded: Loaded) -> list[str]:
    """Missing parameters that tied weights do not fill."""
    missing = set(loaded.missing)
    for target, source in skeleton.module.all_tied_weights_keys.items():
        if (target in missing) != (source in missing):
            missing -= {target, source}
    return sorted(missing)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(escape(name) for name in names[:_SHOWN]) + more
