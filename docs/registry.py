"""Write docs/transformers.md: what moeconv does with every language model in the registry of transformers.

    python docs/registry.py [FILE]

The registry is that of the installed release: the classes for causal language models and for images with text, and the
folders whose configurations count experts. Their source is read, no class is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from moeconv.families.refused import refusals
from moeconv.families.registry import tables

PAGE = Path(__file__).parent / "transformers.md"
_EXPERTS = re.compile(r"^    \w*experts\w*:", re.MULTILINE)
_HEADS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


@dataclass(frozen=True, slots=True)
class Registry:
    """The language models of a release of transformers."""

    # model_type of each class for causal language models, and for images with text
    causal: tuple[str, ...]
    images: tuple[str, ...]
    # folder whose configurations count experts -> the model_types of the folder
    experts: Mapping[str, tuple[str, ...]]

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.causal, *self.images)))


def read() -> Registry:
    """The registry of the installed transformers."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    found = find_spec("transformers.models")
    assert found is not None and found.submodule_search_locations
    (models,) = map(Path, found.submodule_search_locations)
    folders: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        folders.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    experts = {
        folder: tuple(names)
        for folder, names in sorted(folders.items())
        if any(_EXPERTS.search(file.read_text()) for file in (models / folder).glob("configuration_*.py"))
    }
    causal, images = (tuple(getattr(modeling_auto, name)) for name in _HEADS)
    return Registry(causal, images, experts)


def taken(model_type: str) -> str | None:
    """What moeconv does with models of this type, in words; None if it takes none."""
    known = tables()
    model_type = known.aliases.get(model_type, model_type)
    if model_type in known.wrapped:
        rows = known.wrapped[model_type]
        return "; ".join(f"around {text}: {_verbs(text, row.kind)}" for text, row in rows.items())
    found = [row for table in (known.dense, known.moe) if (row := table.get(model_type)) is not None]
    inside = [outer for outer, rows in known.wrapped.items() if model_type in rows]
    if not found and inside:
        return f"inside {', '.join(inside)}: {_verbs(model_type, known.wrapped[inside[0]][model_type].kind)}"
    return "; ".join(_verbs(model_type, row.kind) for row in found) or None


def _verbs(text: str, kind: str) -> str:
    if kind == "moe":
        return "prune, quantize, and all commands for experts"
    targets = [pair.target for pair in tables().pairs if pair.source == text and pair.default]
    return f"upcycle to {targets[0]}" if targets else "upcycle"


def unnamed(registry: Registry) -> list[str]:
    """The model_types, and the folders with experts, that are neither taken nor refused by name."""
    refused = refusals()
    missing = [name for name in registry.named if taken(name) is None and name not in refused]
    return missing + [
        folder
        for folder, names in registry.experts.items()
        if not any(taken(name) is not None or name in refused for name in names)
    ]


def _lines(names: Iterable[str]) -> list[str]:
    refused = refusals()
    rows = ((name, taken(name)) for name in sorted(names))
    cells = [f"| `{name}` | {'yes' if does else 'no'} | {does or refused.get(name, '')} |" for name, does in rows]
    return ["| model_type | taken | by which commands, or why not |", "|---|---|---|", *cells]


def page(registry: Registry) -> str:
    """The text of the page."""
    refused = refusals()
    folders = registry.experts
    of_folder = {name: folder for folder, names in folders.items() for name in names}
    moe = [name for name in registry.named if name in of_folder]
    moe += [
        name
        for folder, names in folders.items()
        if not any(name in registry.named for name in names)
        for name in names
        if taken(name) is not None or name in refused
    ]
    accepted = {folder for folder, names in folders.items() if any(taken(name) is not None for name in names)}
    dense = [name for name in registry.causal if name not in of_folder]
    images = [name for name in registry.images if name not in of_folder and name not in registry.causal]
    return "\n".join([
        "# Language models of transformers",
        "",
        "<!-- written by docs/registry.py, from the registry of transformers and the tables of moeconv -->",
        f"These are all language models in the registry of transformers {version('transformers')}, with what moeconv",
        f"does with them. Of {len(folders)} folders of transformers whose configurations count experts,",
        f"{len(accepted)} are taken. `moeconv families` shows the conversions of dense models; families that",
        "transformers does not have itself are not listed here.",
        "",
        "## Mixtures-of-Experts",
        "",
        *_lines(moe),
        "",
        "## Dense language models",
        "",
        *_lines(dense),
        "",
        "## Models of images and text",
        "",
        *_lines(images),
        "",
    ])  # fmt: skip


def main() -> None:
    registry = read()
    if missing := unnamed(registry):
        sys.exit(f"neither taken nor refused by name: {', '.join(missing)}")
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(registry))


if __name__ == "__main__":
    main()
