"""--self-contained: the loader's files beside the weights, so that trust_remote_code=True works without moeconv.

The files are those of this package with changed imports, so that the written loader is the one that runs here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import moeconv
from moeconv.checkpoint.companions import ENTRY

_ROOT = Path(moeconv.__file__).parent


def remote_code(architecture: str, *, loader: str) -> dict[str, str]:
    """File name -> text of the module `loader`, whose `register` makes transformers load the weights, of everything
    that it imports from this package, and of a module with the class of the model."""
    entry = (
        f'"""Loads the packed weights of this checkpoint; written by moeconv {moeconv.__version__} (Apache-2.0)."""\n\n'
        f"from transformers import {architecture} as _Stock\n\n"
        f"from .{_flat(loader)} import register\n\n"
        "register()\n\n\n"
        f"class {architecture}(_Stock):\n"
        '    """The stock model; importing this file has made its packed weights known to transformers."""\n\n'
        "    # transformers looks for both in the source of the class's own module, which is this file\n"
        "    @classmethod\n"
        "    def _can_set_attn_implementation(cls):\n"
        "        return _Stock._can_set_attn_implementation()\n\n"
        "    @classmethod\n"
        "    def _can_set_experts_implementation(cls):\n"
        "        return _Stock._can_set_experts_implementation()\n"
    )
    files = {f"{ENTRY}.py": entry}
    waiting = [loader]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name not in files:
            text = _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
            waiting += _imported(text)
            files[name] = re.sub(
                r"^from (moeconv[\w.]*) import", lambda m: f"from .{_flat(m[1])} import", text, flags=re.M
            )
    return dict(sorted(files.items()))


def auto_map(architecture: str) -> dict[str, str]:
    """The auto_map of config.json."""
    return {"AutoModelForCausalLM": f"{ENTRY}.{architecture}"}


def _imported(text: str) -> list[str]:
    """The modules of this package that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    return [node.module for node in nodes if node.module and node.module.startswith("moeconv.")]


def _flat(module: str) -> str:
    return module.replace(".", "_")
