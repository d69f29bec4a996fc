"""`moeconv demo`: the whole pipeline on the small trained checkpoint that ships with moeconv, as an ordinary recipe."""

from __future__ import annotations

import os
import tempfile

from moeconv.contract import Ran
from moeconv.errors import OutputError
from moeconv.plan.meter import Meter
from moeconv.recipe.read import DEMO_DATA, load_recipe
from moeconv.recipe.run import run_all


def run_demo(directory: str | None, *, meter: Meter) -> Ran:
    """Upcycle, tune, prune and quantize the demo checkpoint under `directory` (None: a temporary directory). Returns
    the JSON of the recipe. Raises OutputError where `directory` is a file."""
    folder = os.path.abspath(directory) if directory else tempfile.mkdtemp(prefix="moeconv-demo-")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is not a directory", hint="Give a directory for the demo's models.")
    recipe = load_recipe(str(DEMO_DATA / "pipeline.yaml"), settings=[f"work={folder}"])
    result = run_all(recipe, meter=meter)
    result["command"] = "demo"
    return result
