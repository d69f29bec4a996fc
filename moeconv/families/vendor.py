"""What one file of rows/ says: the families of a vendor, what they become, and the multimodal models around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeconv.families.spec import Family, Layout, Pair


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A multimodal family. `texts` are the rows of the language models that it is known to hold; `prefix` and `head`
    stand in its names where theirs begin with "model." and "lm_head."; `beside` as in Family; `root` is the key of
    their config; `in_memory` as in Family, of modules that transformers calls otherwise."""

    model_type: str
    architecture: str
    texts: tuple[Family, ...]
    beside: Mapping[str, str]
    prefix: str = "model.language_model."
    head: str = "lm_head."
    root: str = "text_config"
    tied: bool = False  # whether the head is the embedding where neither config says it
    in_memory: Mapping[str, str] = field(default_factory=dict)

    def row(self, text: Family) -> Family:
        """The row of this wrapper around that language model."""
        return replace(
            text,
            model_type=self.model_type,
            architecture=self.architecture,
            root=self.root,
            prefix=self.prefix,
            base_prefix="model." if self.prefix.startswith("model.") else "",
            beside=self.beside,
            config={**text.config, "tie_word_embeddings": self.tied},
            tensors=self._names(text.tensors),
            mtp=self._names(text.mtp),
            dropped=tuple(self._name(name) for name in text.dropped),
            in_memory={**self.in_memory, **text.in_memory},
            layouts=tuple(Layout(self._names(way.tensors), way.packed) for way in text.layouts),
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
    """The rows of one vendor. A pair stands beside the family that it gives (its target); a package outside may add
    pairs to families of ours. `wrappers` are multimodal models around one of the language models."""

    dense: tuple[Family, ...] = ()
    moe: tuple[Family, ...] = ()
    pairs: tuple[Pair, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
