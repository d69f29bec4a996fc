"""What models write: greedy continuations of a few prompts, by the stock code, with a whole model in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from typing_extensions import TypedDict

from moeconv.checkpoint.strictjson import read_json_object
from moeconv.data.tokenizer import Tokenizer, load_tokenizer
from moeconv.errors import InputError, MoeconvError, escape, first_line
from moeconv.families.model import Model
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.plan.meter import Meter
from moeconv.stream.device import pick_device
from moeconv.stream.layers import fast_experts
from moeconv.stream.need import noted_placement, whole_need
from moeconv.stream.silence import transformers_silenced
from moeconv.stream.skeleton import Skeleton, Stock
from moeconv.tensors import decode_weight, plain_names
from moeconv.units import counted

NEW_TOKENS = 32  # per prompt
SECONDS = 120.0  # of writing per model
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Water boils at",
)
_MOST_PROMPTS = 16
_MOST_BYTES = 1 << 16


class Sample(TypedDict):
    """What a model writes after a prompt. `cut`: time ran out before the last token."""

    text: str
    tokens: int
    cut: bool


def read_prompts(path: str | None) -> tuple[str, ...]:
    """The prompts of a text file, one per line, or without a file the default ones. Raises InputError for a file that
    cannot be read, has no prompt, or has too many."""
    if path is None:
        return PROMPTS
    try:
        with Path(path).open("rb") as file:
            given = file.read(_MOST_BYTES + 1)
        lines = [line.strip() for line in given.decode("utf-8").splitlines()]
    except OSError as error:
        raise InputError(
            f"--prompts {escape(path)} cannot be read: {escape(error.strerror)}", hint="Give a text file."
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"--prompts {escape(path)} is not UTF-8", hint="Give a text file, one prompt per line."
        ) from None
    prompts = tuple(line for line in lines if line)
    if not prompts or len(prompts) > _MOST_PROMPTS or len(given) > _MOST_BYTES:
        large = len(given) > _MOST_BYTES
        size = f"more than {_MOST_BYTES // 1024} KiB" if large else counted(len(prompts), "prompt")
        raise InputError(
            f"--prompts {escape(path)} has {size}",
            hint=f"Give 1 to {_MOST_PROMPTS} prompts, one per line, of at most {_MOST_BYTES // 1024} KiB in all.",
        )
    return prompts


def write_samples(
    model: Model, prompts: Sequence[str], *, meter: Meter, device: str = "auto", seconds: float = SECONDS
) -> list[Sample]:
    """The greedy continuation of every prompt, of at most `NEW_TOKENS` tokens, in the dtype of the weights. Packed
    weights are decoded. After `seconds` of writing, the rest is left out.

    Raises InputError for a model that is larger than the free memory, has no tokenizer, or cannot write.
    """
    tokenizer = load_tokenizer(model.checkpoint.path)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    positions = model.value("max_position_embeddings")
    longest = max(map(len, encoded)) + NEW_TOKENS
    if isinstance(positions, int) and longest > positions:
        raise InputError(
            f"a prompt of {longest - NEW_TOKENS} tokens and {NEW_TOKENS} new ones exceed the {positions} positions of "
            f"{escape(model.checkpoint.path.name)}",
            hint="Shorten it in --prompts FILE.",
        )
    dtype = TORCH_DTYPES[model.dtype]
    need = whole_need([model], trained=0, batch=longest, width=dtype.itemsize)
    noted_placement(need, budget=None, meter=meter, what="writing samples")
    module = _whole(model, dtype, pick_device(device))
    ends = _ends(model)
    until = time.monotonic() + seconds
    try:
        with transformers_silenced(), torch.no_grad():
            return [_sample(module, tokenizer, ids, ends=ends, until=until) for ids in encoded]
    except MoeconvError:
        raise
    except Exception as error:  # whatever the code of a family raises is about the model
        raise InputError(
            f"{escape(model.checkpoint.path.name)} cannot write samples: {first_line(error)}",
            hint="Make the report without --samples.",
        ) from error


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError(
            f"the tokenizer makes no token of the prompt {escape(prompt)}", hint="Change it in --prompts FILE."
        )
    return ids


def _whole(model: Model, dtype: torch.dtype, device: torch.device) -> Stock:
    """The stock model with all its weights. Raises InputError unless it loads strictly."""
    skeleton = Skeleton(model, dtype=dtype, device=device, experts=fast_experts(model, dtype))
    by_layer: dict[int | None, list[str]] = {}
    for name, layer in plain_names(model):
        by_layer.setdefault(layer, []).append(name)
    for layer, names in by_layer.items():
        under = "" if layer is None else skeleton.name_of(skeleton.layers[layer]) + "."
        skeleton.fill({name: decode_weight(model, name) for name in names}, under=under)
    skeleton.tie()
    if empty := [name for name, p in skeleton.module.named_parameters() if p.is_meta]:
        raise InputError(f"the checkpoint has no tensor for {escape(empty[0])}", hint="Copy the checkpoint again.")
    return skeleton.module


def _ends(model: Model) -> list[int]:
    """The ids of the tokens that end a text, from generation_config.json or config.json."""
    path = model.checkpoint.path / "generation_config.json"
    stated: Mapping[str, object] = read_json_object(path, what=path.name) if path.is_file() else {}
    found = stated.get("eos_token_id", model.value("eos_token_id"))
    return [n for n in (found if isinstance(found, list) else [found]) if isinstance(n, int)]


def _sample(module: Stock, tokenizer: Tokenizer, ids: list[int], *, ends: list[int], until: float) -> Sample:
    from transformers import GenerationConfig

    left = until - time.monotonic()
    if left <= 0:
        return {"text": "", "tokens": 0, "cut": True}
    given = torch.tensor([ids], device=module.device)
    module.generation_config = GenerationConfig()  # the checkpoint's own may sample, or penalise repetitions
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, max_time=left, eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    made = module.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
    new = made[0, len(ids) :].tolist()
    ended = len(new) == NEW_TOKENS or (bool(new) and new[-1] in ends)
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return {"text": text, "tokens": len(new), "cut": not ended}
