"""report --samples: what the models write after a few prompts, greedily, in a bounded time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeconv.errors import InputError
from moeconv.evaluate import samples
from moeconv.families.model import open_model
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.read import DEMO_DATA

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = SilentMeter()
DENSE = DEMO_DATA / "model"


@pytest.fixture
def packed(tmp_path, cli) -> Path:
    for words in (("upcycle", DENSE, tmp_path / "moe", "--method", "drop", "--experts", "4"),
                  ("quantize", tmp_path / "moe", tmp_path / "int4", "--scheme", "int4")):  # fmt: skip
        assert cli(*words, "--no-check", "-q").code == 0
    return tmp_path / "int4"


def test_the_texts_are_those_of_stock_generation(tmp_path):
    prompts = samples.read_prompts(None)
    written = samples.write_samples(open_model(DENSE), prompts, meter=QUIET, device="cpu")
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(DENSE, dtype="auto"), AutoTokenizer.from_pretrained(DENSE)
    for prompt, row in zip(prompts, written, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
        assert row["text"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["tokens"] == made.shape[1] - ids.shape[1] and not row["cut"]


def test_a_page_shows_the_texts_before_and_after(tmp_path, cli, packed):
    (tmp_path / "prompts.txt").write_text("import <b>os\n\n  return x | y\n")
    done = cli("report", packed, tmp_path / "a.html", "--samples", "--prompts", tmp_path / "prompts.txt",
               "--reference", DENSE, "--markdown", "--json")  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)["figures"]["samples"]
    assert [row["prompt"] for row in rows] == ["import <b>os", "return x | y"]
    assert all(row["before"] and row["after"] and not row["cut"] for row in rows)
    page, text = (tmp_path / "a.html").read_text(), (tmp_path / "a.md").read_text()
    assert "import &lt;b&gt;os" in page and "<b>os" not in page
    assert "| prompt | reference | this model |" in text and "return x \\| y" in text
    plain = cli("report", packed, tmp_path / "b.html", "--json")
    assert "samples" not in json.loads(plain.out)["figures"] and "Samples" not in (tmp_path / "b.html").read_text()


def test_time_is_bounded():
    cut = samples.write_samples(open_model(DENSE), ("a", "b"), meter=QUIET, device="cpu", seconds=0.0)
    assert cut == [{"text": "", "tokens": 0, "cut": True}] * 2
    brief = samples.write_samples(open_model(DENSE), ("def f(",), meter=QUIET, device="cpu", seconds=0.02)
    assert brief[0]["cut"] == (brief[0]["tokens"] < samples.NEW_TOKENS)


@pytest.mark.parametrize("content", (b"", b"\n \n", b"\xff\xfe", b"a\n" * 17, b"a" * 70_000, None))
def test_prompts_that_cannot_be_used_are_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="--prompts"):
        samples.read_prompts(str(path))


def test_what_cannot_write_is_refused_with_the_reason(tmp_path, cli, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(DENSE, bare, ignore=shutil.ignore_patterns("token*"))
    for given, words, code in (
        (bare, "has no tokenizer", 3),
        (DENSE, "a prompt of", 3),
    ):
        (tmp_path / "long.txt").write_text("word " * 2000)
        done = cli("report", given, tmp_path / "a.html", "--samples", "--prompts", tmp_path / "long.txt")
        assert done.code == code and words in done.err and not (tmp_path / "a.html").exists()
    assert cli("report", DENSE, tmp_path / "a.html", "--prompts", tmp_path / "long.txt").code == 2
    monkeypatch.setattr(samples, "_sample", lambda *_args, **_more: 1 / 0)
    with pytest.raises(InputError, match="model cannot write samples: division by zero"):
        samples.write_samples(open_model(DENSE), ("a",), meter=QUIET)
    monkeypatch.setattr("moeconv.stream.need.free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"writing samples takes at least .* of memory"):
        samples.write_samples(open_model(DENSE), ("a",), meter=QUIET)
