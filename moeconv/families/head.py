"""Output embeddings that differ from the input embeddings although config.json ties them, as PEFT's modules_to_save
leaves them.

transformers 5 compares the two where both are stored and runs what is stored if they differ; older versions and most
other runtimes tie whatever config.json ties. Every step writes such a model untied, which all of them read alike.
"""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject

_WHAT = (
    "config.json ties the output embeddings to the input embeddings, but the stored ones differ: transformers 5 runs "
    "the stored ones, and older runtimes ignore them"
)
_DONE = ". The output keeps them and has tie_word_embeddings = false"


def head_warnings(model: Model, *, writes: bool = True) -> list[str]:
    """The warning about stored output embeddings under a tied config, if any; `writes` adds what the step does."""
    return [_WHAT + _DONE * writes] if model.own_head else []


def with_head(model: Model) -> JsonObject:
    """A copy of config.json, untied where the checkpoint's head is its own."""
    config = model.carried_config
    return untied(config, model.family) if model.own_head else config


def untied(config: Config, family: Family) -> JsonObject:
    """The config with tie_word_embeddings = false, also in the part of it that is a language model's."""
    result = _off(config)
    inner = config.get(family.multimodal.root) if family.multimodal.root else None
    return result | {family.multimodal.root: _off(inner)} if isinstance(inner, dict) else result


def _off(config: Config) -> JsonObject:
    """The config with the embeddings untied; tie_embedding is an older name of the key in lfm2."""
    return {key: value for key, value in config.items() if key != "tie_embedding"} | {"tie_word_embeddings": False}
