"""What stays when the slow tests are left out: every command and every quantized form, once, on a tiny model."""

from __future__ import annotations

import pytest
from tiny import make_dense, make_moe
from unit.test_gguf import tokenizer
from words import add_tokenizer, text

from moeconv.cli.commands import VERBS
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.quantize.formats import FORMATS

RECIPE = """
name: quick
vars: {source: '', work: ''}
steps:
  - {step: upcycle, from: "${source}", to: "${work}/moe", with: {experts: 4, no_check: true}}
"""
MEASURED = ("--data", "{here}/text.txt", "--seq-len", 16)
# command -> what it is given; the model is of 4 experts
WORDS = {
    "inspect": ("{here}/moe",),
    "upcycle": ("{here}/dense", "{here}/out", "--experts", 4, "--no-check"),
    "calibrate": ("{here}/moe", "{here}/stats", *MEASURED),
    "tune": ("{here}/moe", "{here}/out", *MEASURED, "--steps", 2, "--objective", "lm"),
    "prune": ("{here}/moe", "{here}/out", "--keep", 2),
    "quantize": ("{here}/moe", "{here}/out"),
    "evaluate": ("{here}/moe", *MEASURED),
    "verify": ("{here}/moe",),
    "report": ("{here}/moe", "{here}/page.html"),
    "run": ("{here}/quick.yaml", "--set", "source={here}/dense", "--set", "work={here}/work"),
    "families": (),
    "formats": (),
    "demo": ("--where",),
    "schema": ("prune",),
    "import": ("{here}/made/model.gguf", "{here}/out"),
    "arrange": ("{here}/moe", "{here}/out", "--devices", 2, "--stats", "{here}/stats"),
    "collapse": ("{here}/moe", "{here}/out", *MEASURED, "--tokens", 128),
    "recipes": (),
}
# command -> the commands that make what it reads
BEFORE = {
    "import": [("quantize", "{here}/gguf", "{here}/made", "--format", "gguf", "--scheme", "f32")],
    "arrange": [("calibrate", *WORDS["calibrate"])],
}


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_command_runs(tmp_path, cli, verb):
    add_tokenizer(make_dense(tmp_path / "dense"))
    add_tokenizer(make_moe(tmp_path / "moe", experts=4, hidden=64))
    tokenizer(make_moe(tmp_path / "gguf", hidden=256, intermediate=256, vocab=128), size=128)
    (tmp_path / "text.txt").write_text(text(400))
    (tmp_path / "quick.yaml").write_text(RECIPE)
    for first in BEFORE.get(verb, ()):
        assert cli(*(str(word).format(here=tmp_path) for word in first), "--json").code == 0
    done = cli(verb, *(str(word).format(here=tmp_path) for word in WORDS[verb]), "--json")
    assert done.code == 0 and "error" not in done.json, done.out


NEEDS_MORE = ("q2_k_s", "nvfp4-a4")  # an importance matrix, text


@pytest.mark.parametrize(
    ("form", "scheme"),
    [(f.name, s.name) for f in FORMATS.values() if f.takes(MIXTRAL) for s in f.schemes if s.name not in NEEDS_MORE],
)
def test_every_form_is_written(tmp_path, cli, form, scheme):
    source = tokenizer(make_moe(tmp_path / "moe", hidden=256, intermediate=256, vocab=128), size=128)
    done = cli("quantize", source, tmp_path / "out", "--format", form, "--scheme", scheme, "--json")
    assert done.code == 0, done.out
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert done.json["quantize"]["scheme"] == scheme
    most = 0.7 if FORMATS[form].scheme(scheme).bits < 16 else 1.2 if "16" in scheme else 2.2
    assert done.json["bytes"] < most * before
