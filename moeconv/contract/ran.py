"""The JSON of `moeconv run`, `recipes`, `demo` and `report`."""

from __future__ import annotations

from typing import NotRequired, final

from typing_extensions import TypedDict


class StepRow(TypedDict):
    """A step of a recipe; null is what was not measured in it."""

    step: str
    seconds: float
    output: NotRequired[str | None]
    total: NotRequired[int]
    active: NotRequired[int]
    bytes: NotRequired[int]
    loss: NotRequired[float | None]
    kl: NotRequired[float | None]
    passed: NotRequired[bool]
    kept: NotRequired[bool]  # taken from an earlier run
    result: NotRequired[dict[str, object]]  # the step's own JSON
    fused_into: NotRequired[str | None]
    # in a dry run
    plan_id: NotRequired[str | None]
    largest_item_bytes: NotRequired[int | None]
    memory_bytes: NotRequired[int | None]


class Ran(TypedDict):
    """What `moeconv run` and `moeconv demo` print."""

    command: str
    recipe: str
    dry_run: bool
    output: str
    steps: list[StepRow]
    warnings: list[str]
    report: NotRequired[str]
    saved: NotRequired[str]  # the recipe as it was run; not in a dry run
    disk_bytes: NotRequired[int]  # in a dry run
    disk_free_bytes: NotRequired[int]


class ShippedRecipe(TypedDict):
    """A recipe, script or directory of CI files that ships with moeconv."""

    name: str
    files: list[str]
    about: str


@final
class ShippedRecipes(TypedDict):
    """What `moeconv recipes` prints."""

    recipes: list[ShippedRecipe]


@final
class CopiedRecipe(TypedDict):
    """What `moeconv recipes NAME` prints."""

    command: str
    output: str
    copied: list[str]


class Located(TypedDict):
    """What `moeconv demo --where` prints."""

    output: str


class Reported(TypedDict):
    """What `moeconv report` prints; `figures` are those of the page."""

    command: str
    output: str
    bytes: int
    figures: dict[str, object]
    markdown: NotRequired[str]  # with --markdown
    card: NotRequired[str]  # with --card
