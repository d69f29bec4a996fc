"""The content of one file of rows/: a vendor's families, their conversions, and multimodal models that contain them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeconv.families.records import ExpertLayout, Multimodal
from moeconv.families.spec import Family, Pair


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A multimodal family: what it adds to a language model that has a row of its own."""

    # model_type of config.json
    model_type: str
    # the class of transformers, as `architectures` of config.json names it
    architecture: str
    # the rows of the language models that it is known to contain
    texts: tuple[Family, ...]
    # prefix of the names of tensors that every command copies unchanged -> their group, one of BESIDE
    beside: Mapping[str, str]
    # those of these prefixes that only some models of the family have
    may_lack: frozenset[str] = frozenset()
    # replaces "model.", or the prefix that the language model's row has, at the beginning of its names
    prefix: str = "model.language_model."
    # replaces "lm_head." at the beginning of the language model's names
    head: str = "lm_head."
    # prefix of the names of the multi-token-prediction layers, before that of the language model's row
    prediction: str = ""
    # key of config.json with the language model's config
    root: str = "text_config"
    # key that older files have instead, and transformers reads too; "" if there is none
    old_root: str = ""
    # whether the output head is tied to the embedding if neither config states it
    tied: bool = False
    # model_type of the multimodal model with experts that `upcycle` makes of a dense one; "" if there is none
    becomes: str = ""
    # key of config.json with the config of a part beside the language model -> its model_type in this family
    parts: Mapping[str, str] = field(default_factory=dict)
    # whether older files have the language model's settings at the top of config.json
    flat: bool = False
    # beginning of names that only some exports have, and that transformers loads -> the usual beginning
    variants: Mapping[str, str] = field(default_factory=dict)
    # part of a module's name on disk -> its name or names in transformers' modules in memory
    in_memory: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    # formats of packed weights that transformers does not load for this family
    not_loaded: frozenset[str] = frozenset()
    # serving engines whose list of models has the family
    runs: frozenset[str] = frozenset()

    def row(self, text: Family) -> Family:
        """The row of this multimodal family with the language model `text`."""
        tensors = replace(
            text.tensors,
            names=self._names(text, text.tensors.names),
            unchanged={self._name(text, name): group for name, group in text.tensors.unchanged.items()},
            dropped=tuple(self._name(text, name) for name in text.tensors.dropped),
            layouts=tuple(self._layout(text, way) for way in text.tensors.layouts),
            served=text.tensors.served and self._layout(text, text.tensors.served),
            prefix=self.prefix,
            base_prefix="model." if self.prefix.startswith("model.") else "",
            variants=self.variants,
            in_memory={**self.in_memory, **text.tensors.in_memory},
        )
        return replace(
            text,
            model_type=self.model_type,
            architecture=self.architecture,
            tensors=tensors,
            config=replace(text.config, defaults={**text.config.defaults, "tie_word_embeddings": self.tied}),
            prediction=replace(
                text.prediction,
                names=self._names(text, text.prediction.names),
                prefix=self.prediction + text.prediction.prefix,
            ),
            multimodal=Multimodal(self.root, self.beside, text.model_type, self.becomes, self.parts, self.may_lack),
            elsewhere=replace(
                text.elsewhere,
                runs=self.runs,
                runs_not=frozenset(),
                not_loaded=text.elsewhere.not_loaded | self.not_loaded,
            ),
        )

    def _layout(self, text: Family, way: ExpertLayout) -> ExpertLayout:
        return ExpertLayout(self._names(text, way.tensors), way.packed, way.readers)

    def _names(self, text: Family, names: Mapping[str, str]) -> dict[str, str]:
        return {key: self._name(text, name) for key, name in names.items()}

    def _name(self, text: Family, name: str) -> str:
        for old, new in ((text.tensors.prefix, self.prefix), ("model.", self.prefix), ("lm_head.", self.head)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        raise ValueError(name)


# the layout that LLaVA established: the language model, its head, the tower and the projector are side by side
TOWER_AND_PROJECTOR = {"vision_tower.": "vision", "multi_modal_projector.": "vision"}
LLAVA_NAMES: Mapping[str, Any] = {
    "prefix": "language_model.model.",
    "head": "language_model.lm_head.",
    # as some versions of transformers saved them
    "variants": {
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "model.image_newline": "image_newline", **{f"model.{name}": name for name in TOWER_AND_PROJECTOR},
    },
    "in_memory": {
        "language_model.model.": "model.language_model.", **{name: f"model.{name}" for name in TOWER_AND_PROJECTOR}
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vendor:
    """The rows of one vendor.

    A pair is in the file of its target; another package may add pairs between families of moeconv. `wrappers` are
    multimodal models that contain one of the language models. `aliases` maps a model_type whose class is a copy of that
    of another family, in names and in computation, to the model_type of the latter, which outputs state.
    """

    dense: tuple[Family, ...] = ()
    moe: tuple[Family, ...] = ()
    pairs: tuple[Pair, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
