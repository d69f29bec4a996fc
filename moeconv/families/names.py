"""Names of tensors as transformers accepts them: with or without the prefix of the base model, and together with heads
of other classes. Other names are refused; the error states which tool made them, if that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, escape
from moeconv.families.spec import Family
from moeconv.units import counted

_SAVE_INNER = "Save the model inside with save_pretrained, or write the tensors again without that part of their names."
_MERGE = "Merge the adapter: peft's merge_and_unload(), then save_pretrained."
# parts of names that training tools add around modules -> (tool, what to do)
_ADDED = {
    "_orig_mod": ("torch.compile", _SAVE_INNER),
    "_fsdp_wrapped_module": ("FSDP", _SAVE_INNER),
    "_checkpoint_wrapped_module": ("activation checkpointing", _SAVE_INNER),
    "_forward_module": ("Lightning", _SAVE_INNER),
    "module": ("DataParallel or DeepSpeed", _SAVE_INNER),
    "pretrained_model": ("TRL's value head", _SAVE_INNER),
    "base_model": ("PEFT", _MERGE),
    "base_layer": ("PEFT", _MERGE),
}
_AT_START = ("module", "base_model", "pretrained_model")  # in other places, families use these words themselves
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save")
# heads that other classes than a language model's have, which transformers leaves out
_HEADS = ("score.", "v_head.", "value_head.", "classifier.", "qa_outputs.", "reward_head.", "regression_head.")


def module_names(weight: str, family: Family) -> tuple[str, ...]:
    """The names of the module that holds a tensor: on disk, and those of the modules that transformers makes of it."""
    module = weight.rpartition(".")[0]
    names = [module]
    for old, new in family.tensors.in_memory.items():
        words = (new,) if isinstance(new, str) else new
        if old.startswith("^"):
            names = [_begun(name, old[1:], word) for name in names for word in words]
        elif any(old in name for name in names):
            names = [name.replace(old, word) for name in names for word in words]
    return tuple(dict.fromkeys((module, *names)))


def _begun(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def as_loaded(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the names that the class of transformers uses: the prefix of the base model is added or
    removed, as from_pretrained does, and the variants of the family's row get the usual names. Raises InputError for
    names to which a training tool has added a part."""
    checkpoint = _without_variants(checkpoint, family.tensors.variants)
    base = family.tensors.base_prefix
    usual = (base, "lm_head.", *family.multimodal.beside) if base else ("",)
    doubles = not family.multimodal.beside and base not in family.tensors.in_memory
    renamed: dict[str, str] = {}
    inside = _second_words(family)
    text = "\n".join(checkpoint.tensors)  # to search all names at once: a large model has a hundred thousand
    if any(word in text for word in (*_ADDED, *_ADAPTERS)):
        for name in checkpoint.tensors:
            _check_tool(name)
    for name in checkpoint.tensors if base else ():
        if not name.startswith(usual) and name.partition(".")[0] in inside:
            renamed[name] = base + name
        elif doubles and name.startswith((base + base, f"{base}lm_head.")):
            renamed[name] = name.removeprefix(base)
    if not renamed:
        return checkpoint
    _check_twice(checkpoint, renamed, f"with and without the prefix {base!r}")
    what = f"{counted(len(renamed), 'tensor has the name', 'tensors have the names')} of a base model"
    how = f"read and written with the prefix {base!r} added or removed, as transformers does"
    return checkpoint.renamed(renamed, f"{what}: {how}")


def _without_variants(checkpoint: Checkpoint, variants: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with the usual names in place of those that begin with one of `variants`."""
    named = ((name, usual_name(name, variants)) for name in checkpoint.tensors if variants)
    renamed = {name: usual for name, usual in named if usual != name}
    if not renamed:
        return checkpoint
    _check_twice(checkpoint, renamed, "under two names")
    old, new = next(iter(renamed.items()))
    what = f"{counted(len(renamed), 'tensor has a name', 'tensors have names')} of an export of transformers"
    return checkpoint.renamed(renamed, f"{what}: read and written with the hub's, {new} in place of {old}")


def usual_name(name: str, variants: Mapping[str, str]) -> str:
    """The usual name of a tensor, by {beginning of a name, with {L} for the number of a layer: the usual one}."""
    for beginning, usual in variants.items():
        before, numbered, _ = beginning.partition("{L}")
        layer = name.removeprefix(before).partition(".")[0] if numbered and name.startswith(before) else ""
        if name.startswith(old := beginning.replace("{L}", layer)):
            return usual.replace("{L}", layer) + name.removeprefix(old)
    return name


def _check_twice(checkpoint: Checkpoint, renamed: Mapping[str, str], how: str) -> None:
    """Raises InputError if a tensor is there under its old and its new name."""
    if twice := next((new for new in renamed.values() if new in checkpoint.tensors), None):
        raise InputError(
            f"the checkpoint holds {escape(twice)!r} twice, {how}",
            hint="Save it again with only one of the two names.",
        )


def _second_words(family: Family) -> set[str]:
    """The words that follow the base model's prefix in the names of a family."""
    names: Iterable[str] = (
        *family.tensors.names.values(),
        *family.prediction.names.values(),
        *family.multimodal.beside,
    )
    return {
        n.removeprefix(family.tensors.base_prefix).partition(".")[0]
        for n in names
        if n.startswith(family.tensors.base_prefix)
    }


def _check_tool(name: str) -> None:
    parts = name.split(".")
    found = next((p for i, p in enumerate(parts) if p in _ADDED and (i == 0 or p not in _AT_START)), None)
    if found is not None:
        tool, remedy = _ADDED[found]
        raise InputError(
            f"tensor {escape(name)!r} has a name that {tool} made ({found}.); transformers would ignore the tensor "
            "and start with random weights",
            hint=remedy,
        )
    if any(part in _ADAPTERS for part in parts):
        raise InputError(f"tensor {escape(name)!r} belongs to an adapter", hint=_ADDED["base_model"][1])


def is_head(name: str) -> bool:
    """Whether a tensor is of a classification, reward or value head, which no language model has."""
    return name.startswith(_HEADS)


def heads(names: Iterable[str]) -> list[str]:
    """The names that belong to heads."""
    return [name for name in names if is_head(name)]


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of the keys and values that an engine caches, which some exports have beside the
    weights of attention."""
    return name.endswith((".k_scale", ".v_scale"))


def why_no_head(dropped: Iterable[str]) -> str:
    """What to do about a checkpoint without a language model's head; `dropped` are its tensors that are left out."""
    if lost := heads(dropped):
        return f"It has another head ({escape(lost[0])}): give the language model from which it was trained."
    return (
        "A shard is missing, or this is a base model, such as one for embeddings, to which transformers would add a "
        "random head: give the language model from which it was made."
    )
