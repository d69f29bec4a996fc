"""Parameters: sizes, layer lists, choices, and that each word is declared once, with help."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from moeconv import options
from moeconv.errors import UsageError, did_you_mean
from moeconv.options import (
    MeasureOptions,
    PlanOptions,
    QuantizeOptions,
    UpcycleOptions,
    check_names,
    choices_of,
    flag_of,
    from_keywords,
    parse_layers,
    parse_size,
)
from moeconv.plan.build import parse_dtype
from moeconv.plan.execute import parse_part

GROUPS = [g for n, g in vars(options).items() if n.endswith("Options") and dataclasses.is_dataclass(g)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000), ("5 gb", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1KiB", 1024),
        ("1.5kb", 1500), ("0.5G", 500_000_000), ("1000", 1000), ("7b", 7), (12, 12), ("0", 0), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text, flag="--x") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "5 G B", "5PB", "1,5GB", "nan", "inf", "5GB5", "9" * 400, "9e9"]
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="--x") as caught:
        parse_size(text, flag="--x")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", range(10)), (" all ", range(10)), ("0", [0]), ("9,0,3", [0, 3, 9]), ("2-4", [2, 3, 4]),
        ("7-", [7, 8, 9]), ("1, 3-4 ,4", [1, 3, 4]), ("0-9", range(10)),
    ],
)  # fmt: skip
def test_layers(text, chosen):
    assert parse_layers(text, layers=10) == tuple(chosen)


@pytest.mark.parametrize(
    "text", ["", "10", "-1", "-", "3-2", "0-10", "a", "1,,2", "1.5", "0-99999999999999", "9" * 5000]
)
def test_what_are_no_layers(text):
    with pytest.raises(UsageError, match="--layers"):
        parse_layers(text, layers=10)


@pytest.mark.parametrize(("text", "part"), [(None, None), ("0/1", (0, 1)), ("3/4", (3, 4)), (" 1 / 2 ", (1, 2))])
def test_parts(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "1/0", "a/b", "1/2/3", "1.0/2"])
def test_what_is_no_part(text):
    with pytest.raises(UsageError, match="--part"):
        parse_part(text)


def test_dtypes():
    assert [parse_dtype(w) for w in (None, "source", "bfloat16", "float32", "float16")] == [
        None, None, "BF16", "F32", "F16",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--dtype int8"):
        parse_dtype("int8")


def test_take_picks_a_groups_values_and_checks_choices():
    values = {"experts": 4, "seed": 3, "unrelated": object()}
    assert from_keywords(UpcycleOptions, values) == UpcycleOptions(experts=4)
    assert from_keywords(PlanOptions, values) == PlanOptions(seed=3)
    with pytest.raises(UsageError, match="--method cpoy") as caught:
        from_keywords(UpcycleOptions, {"method": "cpoy"})
    assert caught.value.hint == "Did you mean copy?"
    with pytest.raises(UsageError, match="--device gpu"):
        from_keywords(MeasureOptions, {"device": "gpu"})
    with pytest.raises(UsageError, match="--scheme q3_x"):
        from_keywords(QuantizeOptions, {"scheme": "q3_x"})


def test_unknown_parameters_are_named():
    check_names({"experts": 1, "seed": 2}, UpcycleOptions, PlanOptions)
    with pytest.raises(UsageError, match="unknown parameter 'topk'") as caught:
        check_names({"topk": 2}, UpcycleOptions, PlanOptions)
    assert caught.value.hint == "Did you mean top_k?"
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."


def test_every_parameter_has_help_and_a_default_among_its_choices():
    assert len(GROUPS) >= 10
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert field.metadata["help"].strip().endswith(")") or field.metadata["help"].strip().endswith("."), (
                field.name
            )
            choices = choices_of(field)
            assert not choices or field.default is None or field.default in choices, field.name
            assert flag_of(field.name) == "--" + field.name.rstrip("_").replace("_", "-")


def test_groups_that_a_verb_combines_share_no_word():
    from moeconv.cli.commands import VERBS

    for verb in VERBS:
        words = [f.name for g in verb.groups for f in dataclasses.fields(g)]
        words += [p.name for p in verb.positionals]
        assert len(words) == len(set(words)), verb.name


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 0), ("seq_len", 0), ("batch_size", -1), ("max_memory", "much"), ("max_device_memory", "1 cup")],
)
def test_a_measurement_is_refused_by_its_values_even_where_nothing_is_measured(name, value):
    with pytest.raises(UsageError, match=flag_of(name)):
        options.MeasureOptions(**{name: value})


def test_the_types_are_those_of_the_options():
    spec = importlib.util.spec_from_file_location("stubs", Path(__file__).parents[2] / "docs" / "stubs.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(stubs := importlib.util.module_from_spec(spec))
    assert stubs.STUB.read_text() == stubs.stub(), "run python docs/stubs.py"
