"""What one file of rows/ says: the families of a vendor, what they become, and the multimodal models around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeconv.families.records import Elsewhere, ExpertLayout, Multimodal
from moeconv.families.spec import Family, Pair


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A multimodal family: what it puts around a language model that has a row of its own."""

    # model_type of config.json
    model_type: str
    # the class of transformers
    architecture: str
    # the rows of the language models that it is known to hold
    texts: tuple[Family, ...]
    # beginning of the names of tensors that every step passes as they are -> their group, one of BESIDE
    beside: Mapping[str, str]
    # replaces "model." at the beginning of the language model's names
    prefix: str = "model.language_model."
    # replaces "lm_head." at the beginning of the language model's names
    head: str = "lm_head."
    # key of config.json with the language model's config
    root: str = "text_config"
    # whether the head is the embedding where neither config states it
    tied: bool = False
    # part of a module's name on disk -> what transformers calls it in memory
    in_memory: Mapping[str, str] = field(default_factory=dict)
    # serving engines whose list of models has it
    runs: frozenset[str] = frozenset()

    def row(self, text: Family) -> Family:
        """The row of this wrapper around that language model."""
        tensors = replace(
            text.tensors,
            names=self._names(text.tensors.names),
            dropped=tuple(self._name(name) for name in text.tensors.dropped),
            layouts=tuple(ExpertLayout(self._names(way.tensors), way.packed) for way in text.tensors.layouts),
            prefix=self.prefix,
            base_prefix="model." if self.prefix.startswith("model.") else "",
            in_memory={**self.in_memory, **text.tensors.in_memory},
        )
        return replace(
            text,
            model_type=self.model_type,
            architecture=self.architecture,
            tensors=tensors,
            config=replace(text.config, defaults={**text.config.defaults, "tie_word_embeddings": self.tied}),
            prediction=replace(text.prediction, names=self._names(text.prediction.names)),
            multimodal=Multimodal(self.root, self.beside),
            elsewhere=Elsewhere(runs=self.runs),
        )

    def _names(self, names: Mapping[str, str]) -> dict[str, str]:
        return {key: self._name(name) for key, name in names.items()}

    def _name(self, name: str) -> str:
        for old, new in (("model.", self.prefix), ("lm_head.", self.head)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        raise ValueError(name)


@dataclass(frozen=True, slots=True)
class Vendor:
    """The rows of one vendor. A pair is in the file of its target; a package outside may add
    pairs to families of ours. `wrappers` are multimodal models around one of the language models."""

    dense: tuple[Family, ...] = ()
    moe: tuple[Family, ...] = ()
    pairs: tuple[Pair, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
