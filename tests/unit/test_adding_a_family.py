"""CONTRIBUTING.md's example of a new family, replayed: as a file of rows/, and as a package outside."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeconv.families import rows
from moeconv.families.registry import GROUP, tables
from tests.contract import stock, test_defaults

ROOT = Path(__file__).parents[2]
_SECTION = re.search(r"## Adding a family\n(.*?)\n## ", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
assert _SECTION is not None
CODE = textwrap.dedent(re.findall(r"^( *)```python\n(.*?)\n\1```", _SECTION[1], re.S | re.M)[0][1])


class NovellaConfig(LlamaConfig):
    model_type = "novella"

    def __init__(self, residual_scale: float = 1.0, chapter_length: int | None = None, **values) -> None:
        defaults = {"num_key_value_heads": 4, "max_position_embeddings": 8192}
        super().__init__(**{**defaults, **values})
        self.residual_scale, self.chapter_length = residual_scale, chapter_length


class NovellaForCausalLM(LlamaForCausalLM):
    config_class = NovellaConfig


@pytest.fixture
def stock_class(monkeypatch):
    """transformers has the class, as it has that of every family which is added in earnest."""
    AutoConfig.register("novella", NovellaConfig, exist_ok=True)
    AutoModelForCausalLM.register(NovellaConfig, NovellaForCausalLM, exist_ok=True)
    yield
    CONFIG_MAPPING._extra_content.pop("novella", None)
    AutoModelForCausalLM._model_mapping._extra_content.pop(NovellaConfig, None)


@pytest.fixture
def fresh_tables():
    tables.cache_clear()
    yield
    tables.cache_clear()


@pytest.fixture
def in_the_tree(tmp_path, monkeypatch, fresh_tables):
    """The file lies in rows/, as a developer leaves it there."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "novel.py").write_text(CODE)
    monkeypatch.setattr(rows, "__path__", [*rows.__path__, str(folder)])
    yield
    sys.modules.pop(f"{rows.__name__}.novel", None)
    vars(rows).pop("novel", None)


def save(folder: Path, **config) -> Path:
    return stock.save_stock(folder, "novella", stock._DENSE | config, dtype=torch.float32)


def test_one_file_adds_a_family(tmp_path, cli, stock_class, in_the_tree, monkeypatch):
    listed = cli("families", "--json").json
    assert "novella" in listed["dense"]
    assert listed["pairs"][-2:] == [
        {"from": "novella", "to": "mixtral", "exact": True, "default": True, "note": ""},
        {"from": "novella", "to": "granitemoe", "exact": True, "default": False, "note": ""},
    ]
    name = "novella (dense)"
    monkeypatch.setitem(test_defaults.ROWS, name, ("novella", tables().dense["novella"]))
    test_defaults.test_defaults_are_those_of_the_class(name)
    test_defaults.test_rotary_parameters_are_those_of_the_class(name)
    source = save(tmp_path / "dense", attention_bias=False)
    want = stock.logits(stock.load(source))
    for target in ("mixtral", "granitemoe"):
        # the check of upcycle is a process of its own, which knows nothing of a class that exists in this one
        done = cli("upcycle", source, tmp_path / target, "--to", target, "--experts", 4, "--no-check", "--json")
        assert done.code == 0 and done.json["upcycle"]["exact"], done.err
        assert stock.relative_difference(want, stock.logits(stock.load(tmp_path / target))) < 1e-5


def test_a_wrong_default_in_the_row_is_found(stock_class, in_the_tree, monkeypatch):
    row = tables().dense["novella"]
    monkeypatch.setitem(row.config.defaults, "max_position_embeddings", 4096)
    monkeypatch.setitem(test_defaults.ROWS, "novella (dense)", ("novella", row))
    with pytest.raises(AssertionError, match="max_position_embeddings"):
        test_defaults.test_defaults_are_those_of_the_class("novella (dense)")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("residual_scale", 0.5, "novella with residual_scale = 0.5 has no exact equivalent in mixtral"),
        ("chapter_length", "long", "chapter_length must be a whole number"),
        ("attention_bias", True, "novella with attention_bias = True has no exact equivalent in mixtral"),
    ],
)
def test_a_setting_that_the_target_lacks_is_refused(tmp_path, cli, stock_class, in_the_tree, key, value, says):
    source = save(tmp_path / "dense", attention_bias=False)
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(config))
    done = cli("upcycle", source, tmp_path / "out", "--experts", 4)
    assert done.code == 3 and says in done.err
    assert not (tmp_path / "out").exists()


def test_a_package_outside_adds_the_same(tmp_path, cli, stock_class, install, fresh_tables):
    install("novel-families", CODE, group=GROUP, value="VENDOR")
    assert "novella" in cli("families", "--json").json["dense"]
    source = save(tmp_path / "dense", attention_bias=False)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--no-check", "--json")
    assert done.code == 0 and done.json["upcycle"]["to"] == "mixtral", done.err


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("VENDOR = {'dense': ()}", "is of type dict, where a Vendor is expected"),
        (CODE.replace('"novella"', '"llama"'), "is refused: two rows describe the dense family llama"),
        (CODE.replace('"mixtral"', '"mixtrl"'), "the conversion of novella to mixtrl is of a family that has no row"),
        (CODE.replace(", folds=", ", default=True, folds="), "novella to granitemoe is a second default for novella"),
        (CODE.replace('"granitemoe"', '"mixtral"'), "two rows describe the conversion of novella to mixtral"),
    ],
)  # fmt: skip
def test_a_package_that_is_broken_is_named(cli, install, fresh_tables, code, says):
    install("novel-families", code, group=GROUP, value="VENDOR")
    done = cli("families")
    assert done.code == 3
    assert "the package novel-families adds novel_families:VENDOR to moeconv.families, which" in done.err
    assert says in done.err and "pip uninstall novel-families" in done.err and "Traceback" not in done.err
