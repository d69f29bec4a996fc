"""What a directory holds that is no checkpoint which can be read: a row for each kind, with what to do about it."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import InputError, escape

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
# what a trainer leaves beside weights
_TRAINING = ("training_args.bin", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json")


@dataclass(frozen=True, slots=True)
class Kind:
    """`files`: patterns of names (a directory's ends in a slash), one of which tells the kind; {} in `what` becomes the
    first such name."""

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
        "holds GGUF weights ({}), which moeconv writes but does not read",
        "Give the safetensors checkpoint that the GGUF was made from.",
    ),
    Kind(("*.onnx", "onnx/"), "holds an ONNX model ({})", _EXPORTED),
    Kind(("openvino_model.*", "*.engine", "*.mlpackage/"), "holds a compiled model ({})", _EXPORTED),
    Kind(("tf_model*.h5", "*.ckpt.index", "saved_model.pb"), "holds TensorFlow weights ({})",
         "Load it with transformers 4 and from_tf=True, then save_pretrained."),
    Kind(("flax_model*.msgpack",), "holds Flax weights ({})",
         "Load it with transformers 4 and from_flax=True, then save_pretrained."),
    Kind(("*.npz",), "holds MLX or NumPy weights ({})", _EXPORTED),
)  # fmt: skip


def refusal(directory: Path, entries: Sequence[os.DirEntry[str]], *, lacks: str) -> InputError:
    """The error for a directory without config.json or without weights; `lacks` says which of them."""
    where = escape(directory)
    names = [f"{e.name}/" if e.is_dir() else e.name for e in entries]
    if "adapter_config.json" in names:
        return _adapter(directory)
    if inside := [e.name for e in entries if e.is_dir() and _is_checkpoint(Path(e.path))]:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        return InputError(
            f"{where} is no checkpoint but holds some: {', '.join(map(escape, inside[:_SHOWN]))}{more}",
            hint=f"Give one of them, such as {escape(directory / inside[-1])}.",
        )
    weights = [name for name in names if name in ("model.safetensors", "model.safetensors.index.json")]
    if shards := [found for name in names if not weights and (found := _SHARD.fullmatch(name))]:
        return _without_index(where, shards)
    for kind in KINDS:
        telling = [n for n in names if _one_of(n, kind.files) and not _one_of(n, _TRAINING)]
        if telling and not weights:
            return InputError(f"{where} {kind.what.format(escape(telling[0]))}", hint=kind.hint)
    if others := [name for name in names if not weights and name.endswith(".safetensors")]:
        return InputError(
            f"{where} holds {escape(others[0])}, a name that transformers does not look for",
            hint="If it is the whole model, rename it to model.safetensors.",
        )
    return InputError(f"{where}{lacks}", hint=_lacking(names))


def _lacking(names: Sequence[str]) -> str:
    if not names:
        return "It is empty: is this the right path, and did the download end?"
    if "config.json" in names:
        return "Give a directory of safetensors shards as transformers' save_pretrained writes it."
    return "Is this a checkpoint directory? Download config.json again, or give the directory that holds it."


def _one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_checkpoint(directory: Path) -> bool:
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    return "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def _without_index(where: str, shards: Sequence[re.Match[str]]) -> InputError:
    stem, _, count = shards[0].groups()
    have = {int(found[2]) for found in shards if found[1] == stem and found[3] == count}
    missing = [i for i in range(1, min(int(count), 10_000) + 1) if i not in have]
    lost = f"; number {', '.join(map(str, missing[:_SHOWN]))} of {int(count)} missing" if missing else ""
    return InputError(
        f"{where} holds {len(have)} of {int(count)} shards ({escape(shards[0][0])}, ...) without an index, so nothing "
        f"says which tensors belong to the model{lost}",
        hint=f"Download {escape(stem)}.safetensors.index.json from where the shards are from"
        + (" and the missing shards." if missing else "."),
    )


def _adapter(directory: Path) -> InputError:
    """A PEFT adapter names the model that it belongs to."""
    try:
        data = (directory / "adapter_config.json").read_bytes()[:_MAX_ADAPTER]
        config = json.loads(data)
    except (OSError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    kind, base = (config.get(key) for key in ("peft_type", "base_model_name_or_path"))
    of = f" of {escape(base)}" if isinstance(base, str) and base else ""
    return InputError(
        f"{escape(directory)} is an adapter ({escape(kind or 'PEFT')}){of}, not a model",
        hint="Merge it first: peft's AutoPeftModelForCausalLM.from_pretrained(DIRECTORY).merge_and_unload()"
        ".save_pretrained(OUT), then give OUT.",
    )
