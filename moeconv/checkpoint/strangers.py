"""Errors for a directory that is not a readable checkpoint: one row per kind of content, with what to do about it."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import InputError, escape
from moeconv.units import counted

_SHARD = re.compile(r"(?!consolidated)(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SHOWN = 4
_MAX_ADAPTER = 1 << 20
_ORIGINAL = (
    "Give the layout of transformers: the same repository usually has it as model*.safetensors with config.json, and "
    "transformers has a script for the rest (convert_*_weights_to_hf)."
)
_EXPORTED = "It was exported from a checkpoint: give that one, as safetensors."
_PICKLED = (
    "Convert it to safetensors first, in a sandbox: load it with transformers there and "
    "save_pretrained(..., safe_serialization=True)."
)
# files that a trainer leaves beside the weights
_TRAINING = ("training_args.bin", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of content. `files` are patterns of names (those of directories end in a slash); one matching name
    identifies the kind, and replaces {} in `what`."""

    files: tuple[str, ...]
    what: str
    hint: str


KINDS = (
    Kind(("model_index.json",), "holds a diffusers pipeline ({})", "moeconv takes language models."),
    Kind(
        ("consolidated*.safetensors",),
        "holds weights in Mistral's original layout ({}), not in transformers'",
        _ORIGINAL,
    ),
    Kind(("consolidated*.pth",), "holds weights in Meta's original layout ({}), not in transformers'", _ORIGINAL),
    Kind(
        ("*.distcp", "pytorch_model_fsdp*/", "global_step*/", "zero_pp_rank_*", "bf16_zero_pp_rank_*"),
        "holds a trainer's own sharded state ({})",
        "Gather it first: accelerate merge-weights for FSDP, zero_to_fp32.py for DeepSpeed; then save_pretrained.",
    ),
    Kind(("*.bin", "*.pth", "*.pt", "*.ckpt"), "holds pickled weights ({}), which can run code when loaded", _PICKLED),
    Kind(
        ("*.gguf",),
        "holds GGUF weights ({}), and no checkpoint of transformers",
        "Give the checkpoint that they were made from, or make one: moeconv import FILE.gguf OUT.",
    ),
    Kind(("*.onnx", "onnx/"), "holds an ONNX model ({})", _EXPORTED),
    Kind(("openvino_model.*", "*.engine", "*.mlpackage/"), "holds a compiled model ({})", _EXPORTED),
    Kind(("tf_model*.h5", "*.ckpt.index", "saved_model.pb"), "holds TensorFlow weights ({})",
         "Load it with transformers 4 and from_tf=True, then save_pretrained."),
    Kind(("flax_model*.msgpack",), "holds Flax weights ({})",
         "Load it with transformers 4 and from_flax=True, then save_pretrained."),
    Kind(("*.npz",), "holds MLX or NumPy weights ({})", _EXPORTED),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Listing:
    """A directory and its entries; the names of directories among them end in a slash."""

    directory: Path
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        return escape(self.directory)


def refusal(directory: Path, entries: Sequence[os.DirEntry[str]], *, lacks: str) -> InputError:
    """The error for a directory without config.json or without weights; `lacks` names which of them."""
    found = _Listing(directory, tuple(f"{e.name}/" if e.is_dir() else e.name for e in entries))
    with_weights = any(name in ("model.safetensors", "model.safetensors.index.json") for name in found.names)
    for check in _CHECKS if with_weights else (*_CHECKS, *_CHECKS_WITHOUT_WEIGHTS):
        if (error := check(found)) is not None:
            return error
    return InputError(f"{found.where}{lacks}", hint=_hint_for_missing(found.names))


def _hint_for_missing(names: Sequence[str]) -> str:
    if not names:
        return "The directory is empty: is this the right path, and was the download complete?"
    if "config.json" in names:
        return "Give a directory of safetensors shards as transformers' save_pretrained writes it."
    return "Is this a checkpoint directory? Download config.json again, or give the directory that holds it."


def _holds_checkpoints(found: _Listing) -> InputError | None:
    """The error for a directory whose subdirectories are checkpoints."""
    folders = [name.rstrip("/") for name in found.names if name.endswith("/")]
    inside = [name for name in folders if _is_checkpoint(found.directory / name)]
    if not inside:
        return None
    more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
    return InputError(
        f"{found.where} is not a checkpoint but contains checkpoints: {', '.join(map(escape, inside[:_SHOWN]))}{more}",
        hint=f"Give one of them, such as {escape(found.directory / inside[-1])}.",
    )


def _known_kind(found: _Listing) -> InputError | None:
    """The error for weights in a layout that moeconv does not read."""
    for kind in KINDS:
        matching = [n for n in found.names if _one_of(n, kind.files) and not _one_of(n, _TRAINING)]
        if matching:
            return InputError(f"{found.where} {kind.what.format(escape(matching[0]))}", hint=kind.hint)
    return None


def _other_name(found: _Listing) -> InputError | None:
    """The error for a safetensors file with a name that no loader uses."""
    others = [name for name in found.names if name.endswith(".safetensors")]
    if not others:
        return None
    return InputError(
        f"{found.where} holds {escape(others[0])}, a name that transformers does not look for",
        hint="If it is the whole model, rename it to model.safetensors.",
    )


def _one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_checkpoint(directory: Path) -> bool:
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    return "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def _without_index(found: _Listing) -> InputError | None:
    """The error for shards without their index."""
    shards = [match for name in found.names if (match := _SHARD.fullmatch(name))]
    if not shards:
        return None
    stem, _, count = shards[0].groups()
    have = {int(match[2]) for match in shards if match[1] == stem and match[3] == count}
    missing = [i for i in range(1, min(int(count), 10_000) + 1) if i not in have]
    lost = f"; number {', '.join(map(str, missing[:_SHOWN]))} of {int(count)} missing" if missing else ""
    return InputError(
        f"{found.where} holds {len(have)} of {counted(int(count), 'shard')} ({escape(shards[0][0])}, ...) "
        "without an index, so it "
        f"is unknown which tensors belong to the model{lost}",
        hint=f"Download {escape(stem)}.safetensors.index.json from the place that has the shards"
        + (", and the missing shards." if missing else "."),
    )


def _adapter(found: _Listing) -> InputError | None:
    """The error for a PEFT adapter, which names the model that it belongs to."""
    if "adapter_config.json" not in found.names:
        return None
    try:
        data = (found.directory / "adapter_config.json").read_bytes()[:_MAX_ADAPTER]
        config = json.loads(data)
    except (OSError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    kind, base = (config.get(key) for key in ("peft_type", "base_model_name_or_path"))
    of = f" of {escape(base)}" if isinstance(base, str) and base else ""
    return InputError(
        f"{found.where} is an adapter ({escape(kind or 'PEFT')}){of}, not a model",
        hint="Merge it first: peft's AutoPeftModelForCausalLM.from_pretrained(DIRECTORY).merge_and_unload()"
        ".save_pretrained(OUT), then give OUT.",
    )


_CHECKS: tuple[Callable[[_Listing], InputError | None], ...] = (_adapter, _holds_checkpoints)
_CHECKS_WITHOUT_WEIGHTS = (_without_index, _known_kind, _other_name)
