"""Help texts: where they are found, what they show, what the shell completes, and the words that options understand."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from moeconv.cli import app
from moeconv.cli.commands import VERBS
from moeconv.cli.examples import EXAMPLES, PAGES
from moeconv.demo import DEMO_DATA
from moeconv.errors import UsageError
from moeconv.options import PANELS, PruneOptions, QuantizeOptions, UpcycleOptions, from_keywords, metavar_of, option
from tests.tiny import make_moe


def flat(text):
    """The words of a help text, without frames and line breaks."""
    return " ".join(text.translate(str.maketrans("│╭╮╰╯─", "      ")).split())


def test_without_a_command_all_commands_are_listed(cli):
    bare = cli()
    assert bare.code == 0 and not bare.err
    assert all(verb.help.split(",")[0].split()[0] in flat(bare.out) for verb in VERBS)
    assert cli("--help").out.strip() == cli("-h").out.strip() == cli("help").out.strip() == bare.out.strip()


def test_three_ways_to_the_help_of_a_command(cli):
    texts = [cli("prune", "-h"), cli("prune", "--help"), cli("help", "prune")]
    assert [text.code for text in texts] == [0, 0, 0]
    assert len({text.out for text in texts}) == 1 and "magnitude, random." in flat(texts[0].out)


def test_help_of_a_command_that_does_not_exist(cli):
    refused = cli("help", "prun")
    assert refused.code == 2 and "prun" in refused.err


def test_a_help_text_shows_options_by_subject_in_one_order(cli):
    text = cli("upcycle", "-h").out
    places = [text.index(f"─ {panel} ─") for panel in ("Arguments", *PANELS)]
    assert places == sorted(places)
    assert "TEXT" not in text and "<bool>" not in text.split("What it does")[1]


def test_few_choices_stand_in_the_place_of_the_value(cli, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "160")
    text = flat(cli("quantize", "-h").out)
    assert "--method [rtn|mse|gptq|awq|auto]" in text and "--max-bytes SIZE" in text and "--data FILE" in text


@dataclasses.dataclass
class Words:
    few: str = option("a", "A.", choices=("a", "b"))
    many: str = option("a", "A.", choices=tuple(f"choice-{i}" for i in range(9)))
    size: str = option("1GB", "A.", metavar="SIZE")
    count: int | None = option(None, "A.")
    share: float = option(0.5, "A.")
    switch: bool | None = option(None, "A.")
    model: str = option("", "A.", reads="model")


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [
        ("few", str, "[a|b]"), ("many", str, "NAME"), ("size", str, "SIZE"), ("count", int | None, "N"),
        ("share", float, "X"), ("switch", bool | None, ""), ("model", str, "MODEL"),
    ],
)  # fmt: skip
def test_what_stands_in_the_place_of_a_value(name, kind, shown):
    (field,) = [f for f in dataclasses.fields(Words) if f.name == name]
    assert metavar_of(field, kind, field.metadata["choices"]) == shown


def test_the_shell_completes_choices():
    found = subprocess.run(
        [sys.executable, "-m", "moeconv"], capture_output=True, text=True, check=True,
        env=os.environ | {"_MOECONV_COMPLETE": "complete_bash", "COMP_WORDS": "moeconv quantize --method ",
                          "COMP_CWORD": "3"},
    )  # fmt: skip
    assert found.stdout.split() == ["rtn", "mse", "gptq", "awq", "auto"]


def test_every_command_has_two_examples_and_a_page(cli):
    assert list(EXAMPLES) == [verb.name for verb in VERBS]
    for verb in VERBS:
        text = flat(cli(verb.name, "-h").out)
        assert f"{PAGES}{verb.name}.md" in text
        assert all(f"moeconv {verb.name} {words}".strip() in text for words in EXAMPLES[verb.name]), text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(DEMO_DATA / "model", folder / "model")
    for name in ("text.txt", "code.txt"):
        shutil.copy(DEMO_DATA / "calibration.txt", folder / name)
    (folder / "recipe.yaml").write_text(
        "vars: {experts: 4}\nsteps:\n  - step: upcycle\n    from: model\n    to: made\n"
        '    with: {experts: "${experts}"}\n'
    )
    return folder


# what makes an example quick: a dry run, or less text. The model that `evaluate` reads is packed without data.
QUICKLY = dict.fromkeys(("tune", "prune", "quantize"), ("--dry-run",)) | dict.fromkeys(
    ("calibrate", "evaluate"), ("--tokens", "512")
)


@pytest.mark.slow
def test_the_examples_run_in_their_order(place, monkeypatch):
    monkeypatch.chdir(place)
    for name, examples in list(EXAMPLES.items())[:-1]:  # tests/e2e/test_quick.py runs the demo
        if name == "import":
            assert app.run(["quantize", "moe", "gguf", "--format", "gguf", "--scheme", "q8_0", "--no-check"]) == 0
            shutil.move(place / "gguf" / "model.gguf", place)
        if name == "evaluate":
            assert app.run(["quantize", "moe", "packed", "--no-check"]) == 0
        for number, words in enumerate(examples):
            quickly = ("--dry-run",) if (name, number) == ("upcycle", 1) else QUICKLY.get(name, ())
            assert app.run([name, *shlex.split(words), *quickly]) == 0, (name, words)


@pytest.mark.parametrize(
    ("typed", "scheme"),
    [("W4A16", "int4"), ("w8a16", "int8"), ("q8", "q8_0"), ("Q8_0", "q8_0"), ("Q4_K_M", "q4_k_m"), ("NF4", "nf4")],
)
def test_schemes_by_other_words(typed, scheme):
    assert from_keywords(QuantizeOptions, {"scheme": typed}).scheme == scheme


@pytest.mark.parametrize("typed", ["Mixtral", "mixtral", "MixtralForCausalLM", "MIXTRAL"])
def test_targets_by_other_words(typed):
    assert from_keywords(UpcycleOptions, {"to": typed}).to == "mixtral"


@pytest.mark.parametrize(("typed", "criterion"), [("frequency", "utilization"), ("EAN_sum", "ean-sum")])
def test_criteria_by_other_words(typed, criterion):
    assert from_keywords(PruneOptions, {"criterion": typed}).criterion == criterion


def test_a_word_that_is_not_one_is_left_to_the_check_that_names_it():
    assert from_keywords(UpcycleOptions, {"to": "mixtrl"}).to == "mixtrl"
    with pytest.raises(UsageError, match="--scheme q9"):
        from_keywords(QuantizeOptions, {"scheme": "q9"})


def test_other_words_give_the_same_plan(cli, tmp_path):
    moe = make_moe(tmp_path / "moe", hidden=64, intermediate=128)
    ids = {cli("quantize", moe, tmp_path / "o", "--scheme", word, "--dry-run", "--json").json["plan_id"]
           for word in ("int4", "INT4", "w4a16")}  # fmt: skip
    assert len(ids) == 1


def test_a_name_of_the_hub_that_is_no_directory_is_spelled_out(cli):
    assert "hf://meta-llama/Llama-3.2-1B for the hub" in cli("inspect", "meta-llama/Llama-3.2-1B").err
    assert "hf://OWNER/NAME for the hub" in cli("inspect", "./models/mine").err


def test_quiet_prints_no_progress(cli, tmp_path):
    moe = make_moe(tmp_path / "moe", hidden=64, intermediate=128)
    done = cli("quantize", moe, tmp_path / "out", "-q")
    assert done.out == f"{tmp_path / 'out'}\n" and done.err == ""
    assert "shard 1/1" in cli("quantize", moe, tmp_path / "out2").err
