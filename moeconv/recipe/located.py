"""Errors of a step name the line of the recipe that asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moeconv.errors import MoeconvError, escape
from moeconv.recipe.read import Recipe, Step


def place(recipe: Recipe, step: Step) -> str:
    """The file and line of a step, and its name."""
    return f"{escape(os.path.basename(recipe.path))}:{step.line}: {escape(step.name)}"


@contextmanager
def located(recipe: Recipe, step: Step) -> Iterator[None]:
    """A block in which the message of every moeconv error begins with the place of the step."""
    try:
        yield
    except MoeconvError as error:
        error.message = f"{place(recipe, step)}: {error.message}"
        error.args = (error.message,)
        raise
