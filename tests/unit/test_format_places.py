"""`moeconv formats --for`: what loads in a runtime or on a machine, with size, error and command."""

from __future__ import annotations

import pytest

from moeconv.quantize.formats import FORMATS
from moeconv.quantize.listing import formats, places
from moeconv.quantize.spec import HARDWARE


def test_every_scheme_names_machines_that_are_known():
    known = set(HARDWARE)
    for f in FORMATS.values():
        assert known >= set(f.hardware)
        assert all(known >= set(info.hardware) for info in f.schemes), f.name


@pytest.mark.parametrize("place", places())
def test_a_place_lists_what_loads_there_with_the_command(cli, place):
    found = cli("formats", "--for", place, "--json").json
    assert found["place"] == place
    names = {row["name"] for row in found["formats"]}
    for row in formats()["formats"]:
        loads = row["loads"].get(place) in ("ok", "dequantized")
        assert (row["name"] in names) == (loads or place in row["hardware"])
    sizes = [row["stored_bits"] or row["bits"] for row in found["formats"] if row["bits"]]
    assert sizes == sorted(sizes)
    assert all(f"--format {row['format']} --scheme " in row["command"] for row in found["formats"])


def test_bits_count_the_scales():
    bits = {row["name"]: row["stored_bits"] for row in formats()["formats"]}
    assert bits["compressed-tensors nvfp4"] == 4.5 and bits["compressed-tensors mxfp4"] == 4.25
    assert bits["compressed-tensors int4"] == 4.125


def test_an_unknown_place_is_refused(cli):
    done = cli("formats", "--for", "nowhere", "--json")
    assert done.code == 2 and "nowhere" in done.json["error"]["message"]
