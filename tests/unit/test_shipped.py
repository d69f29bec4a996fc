"""`moeconv recipes`: what ships with moeconv is listed, and copied into the directory of the user."""

from __future__ import annotations

import json

import pytest
import yaml

from moeconv.recipe.shipped import SHIPPED, shipped


def test_every_file_that_ships_is_listed_with_what_it_is_for(cli):
    listed = json.loads(cli("recipes", "--json").out)
    rows = {row["name"]: row for row in listed["recipes"]}
    assert {"dense-to-int4", "pipeline.sh", "ci"} <= set(rows) == set(shipped())
    assert {path.name for path in SHIPPED.glob("*.*")} == {f for row in rows.values() for f in row["files"]} - {
        path.name for path in (SHIPPED / "ci").iterdir()
    }
    assert all(row["about"].endswith(".") and len(row["about"]) > 12 for row in rows.values())


def test_a_copy_goes_where_the_user_says_and_replaces_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("recipes", "grid", "-q").out == "grid.yaml\n"
    assert yaml.safe_load((tmp_path / "grid.yaml").read_text())["name"] == "grid"
    assert cli("recipes", "grid").code == 4
    assert cli("recipes", "grid.yaml", "deep/er/").code == 0 and (tmp_path / "deep/er/grid.yaml").is_file()
    copied = json.loads(cli("recipes", "ci", "mine", "--json").out)
    assert copied["copied"] == ["mine/constraints.txt", "mine/convert.sh", "mine/workflow.yml"]
    steps = yaml.safe_load((tmp_path / "mine/workflow.yml").read_text())["jobs"]["convert"]["steps"]
    assert any("-c ci/constraints.txt" in step.get("run", "") for step in steps)


@pytest.mark.parametrize("name", ["grd", "../ci", ""])
def test_a_name_that_does_not_ship_is_refused(cli, name):
    refused = cli("recipes", name)
    assert refused.code == 2 and ("grid" in refused.err or "`moeconv recipes`" in refused.err)
