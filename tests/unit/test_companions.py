"""The files beside the shards: all that transformers' loaders know come along, code unread and only where a file asks
for it, and what stays behind is named."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import transformers
from tiny import edit_json, make_dense, make_moe
from words import add_tokenizer

from moeconv.checkpoint.companions import TEMPLATES, find_companions, has_vocabulary, is_companion_name
from moeconv.checkpoint.reader import Checkpoint
from moeconv.data.tokenizer import load_tokenizer
from moeconv.errors import InputError


def constants(path: Path) -> dict[str, object]:
    """The constants of a module that are literals."""
    found: dict[str, object] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def known_to_transformers() -> set[str]:
    """Names of all files that transformers' tokenizers, processors and generation read beside the weights."""
    from transformers import utils
    from transformers.integrations.mistral.constants import TEKKEN_VOCAB_FILE
    from transformers.utils import hub

    root = Path(transformers.__file__).parent
    vocabularies = [constants(path).get("VOCAB_FILES_NAMES") for path in root.glob("models/*/tokenization_*.py")]
    names = {name for found in vocabularies if isinstance(found, dict) for name in found.values()}
    assert len(names) > 20  # the constant is still called so
    for path in root.glob("tokenization_*.py"):
        words = constants(path)
        names |= {str(v) for k, v in words.items() if k.endswith(("_FILE", "_LEGACY_NAME")) and "." in str(v)}
    names |= {
        utils.FEATURE_EXTRACTOR_NAME, utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.PROCESSOR_NAME,
        utils.AUDIO_TOKENIZER_NAME, utils.GENERATION_CONFIG_NAME, utils.MODEL_CARD_NAME, TEKKEN_VOCAB_FILE,
        hub.CHAT_TEMPLATE_FILE, hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{hub.CHAT_TEMPLATE_DIR}/tool_use.jinja",
    }  # fmt: skip
    return names | {"tokenizer.4.0.0.json", "tokenizer.model.v3", "tokenizer.model.v11m1", "qwen.tiktoken"}


@pytest.fixture(scope="module")
def known() -> set[str]:
    return known_to_transformers()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "source", shards=3)


def test_every_file_that_transformers_reads_comes_along(source: Path, known: set[str]) -> None:
    for name in known:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{}")
    found = find_companions(Checkpoint(source))
    assert set(found.files) == known and not found.left and not found.code
    assert dict(found.read()) == dict.fromkeys(known, b"{}")


def test_the_loader_of_tokenizers_knows_every_vocabulary(tmp_path: Path, known: set[str]) -> None:
    """Files that transformers names as a vocabulary or a whole tokenizer are enough to try."""
    root = Path(transformers.__file__).parent
    for path in root.glob("models/*/tokenization_*.py"):
        found = constants(path).get("VOCAB_FILES_NAMES")
        if not isinstance(found, dict):
            continue
        folder = tmp_path / path.parent.name
        folder.mkdir(exist_ok=True)
        for name in found.values():
            (folder / name).touch()
        assert has_vocabulary(folder), found
    for name in ("tekken.json", "tiktoken.model", "tokenizer.model.v3", "qwen.tiktoken"):
        folder = tmp_path / f"only {name}"
        folder.mkdir()
        assert not has_vocabulary(folder)
        (folder / name).touch()
        assert has_vocabulary(folder)


def test_what_stays_behind_is_named(source: Path) -> None:
    keep = {"tokenizer.json": b"{}", "LICENSE": b"free", "chat_template.jinja": b"{{ x }}", "merges.txt": b"a b"}
    for name, data in keep.items():
        (source / name).write_bytes(data)
    strange = ("modeling_evil.py", "LICENSE.py", "pytorch_model.bin", "tokenizer.json.exe", "notes.txt", "a\nb.txt")
    for name in (*strange, ".gitattributes"):
        (source / name).write_bytes(b"no")
    for folder in ("NOTICE", "onnx", TEMPLATES):
        (source / folder).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("{{ y }}")
    (source / TEMPLATES / "rag.py").write_text("no")
    (source / "README.md").symlink_to("/etc/hostname")
    found = find_companions(Checkpoint(source))
    assert dict(found.read()) == keep | {f"{TEMPLATES}/rag.jinja": b"{{ y }}"}
    assert set(found.left) == {*strange, "NOTICE/", "onnx/"} and not found.code
    (warning,) = found.warnings
    assert "modeling_evil.py" in warning and "onnx/" in warning and "a\\nb.txt" in warning and "\n" not in warning


def test_files_stay_byte_for_byte(source: Path) -> None:
    text = b'{ "model_max_length":5,   "nested": {"auto_map": 1} }'
    (source / "tokenizer_config.json").write_bytes(text)
    found = find_companions(Checkpoint(source))
    assert dict(found.read()) == {"tokenizer_config.json": text} and not found.askers


@pytest.mark.parametrize(
    ("name", "entry", "comes"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.T", None]}, True),
        ("processor_config.json", {"AutoProcessor": "processing_x.P"}, True),
        ("tokenizer_config.json", {"AutoTokenizer": ["someone/else--tokenization_x.T", None]}, False),
        ("tokenizer_config.json", {"AutoTokenizer": "Xenova/gpt-4o"}, False),
        ("tokenizer_config.json", "nonsense", False),
    ],
)
def test_code_comes_along_only_where_a_file_asks_for_code_of_this_directory(
    source: Path, name: str, entry: object, comes: bool
) -> None:
    (source / name).write_text(json.dumps({"auto_map": entry}))
    (source / "tokenization_x.py").write_text("raise SystemExit('ran')")
    (source / "helper.py").write_text("import os")
    found = find_companions(Checkpoint(source))
    assert set(found.code) == ({"tokenization_x.py", "helper.py"} if comes else set())
    assert [name in w and "never run" in w for w in found.warnings] == ([True] if comes else [False])
    for path in source.glob("*.py"):
        path.unlink()
    assert bool(find_companions(Checkpoint(source)).warnings) == comes  # what is asked for and not there is said


def test_a_tokenizer_that_is_code_comes_along_with_its_files(tmp_path: Path, cli) -> None:
    source = make_moe(tmp_path / "source", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    (source / "tiktoken.model").write_bytes(b"aGk= 0")
    for name in ("c.py", "m.py", "t.py"):
        (source / name).write_text("raise SystemExit('code of a checkpoint ran')")
    planned = cli("prune", source, tmp_path / "out", "--ratio", 0.5, "--dry-run", "--json").json["warnings"]
    done = cli("prune", source, tmp_path / "out", "--ratio", 0.5, "--no-check", "--json")
    assert done.code == 0, done.out
    assert set(planned) <= set(done.json["warnings"])
    steps = [{"step": "prune", "name": "cut", "from": str(source), "to": "cut", "with": {"ratio": 0.5}}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps}))
    told = cli("run", tmp_path / "recipe.yaml", "--dry-run", "--json").json["warnings"]
    assert {f"cut: {text}" for text in planned} <= set(told)
    assert any("c.C" in w and "m.M" in w and "mixtral itself" in w for w in planned)
    assert any("t.py" in w and "never run" in w for w in planned)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("tokenizer_config.json", "tiktoken.model", "t.py"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path / "out")
    assert "never runs" in caught.value.hint


@pytest.mark.parametrize(
    ("command", "flags"),
    [("upcycle", ()), ("upcycle", ("--top-k", 2)), ("prune", ("--keep", 2)), ("quantize", ("--scheme", "int4"))],
)
def test_no_step_keeps_the_names_of_code_that_transformers_replaces(tmp_path: Path, cli, command, flags) -> None:
    """Of an MoE source `upcycle` makes more experts, another way to carry config.json over."""
    make = make_dense if command == "upcycle" and not flags else make_moe
    code = {"AutoModelForCausalLM": "modeling_x.Y", "AutoTokenizer": "tokenization_x.T"}
    source = make(tmp_path / "source", hidden=64, intermediate=64, auto_map=code)
    for name in ("modeling_x.py", "tokenization_x.py"):
        (source / name).write_text("")
    done = cli(command, source, tmp_path / "out", *flags, "--no-check", "--json")
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {"AutoTokenizer": "tokenization_x.T"}
    assert any("modeling_x.Y" in w for w in done.json["warnings"])
    assert (tmp_path / "out" / "tokenization_x.py").is_file()


def test_what_was_written_to_load_itself_still_does_when_it_is_cut(tmp_path: Path, cli) -> None:
    source = make_moe(tmp_path / "source", hidden=64, intermediate=64)
    packed, pruned, plain = (tmp_path / name for name in ("packed", "pruned", "plain"))
    form = ("--format", "bitsandbytes", "--scheme", "int8", "--no-check")
    assert cli("quantize", source, packed, *form, "--self-contained").code == 0
    done = cli("prune", packed, pruned, "--keep", 2, "--criterion", "random", "--no-check", "--json")
    assert done.code == 0, done.out
    assert json.loads((pruned / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "modeling_moeconv.MixtralForCausalLM"
    }
    assert {p.name for p in pruned.glob("*.py")} == {p.name for p in packed.glob("*.py")} != set()
    done = cli("quantize", packed, plain, "--scheme", "int4", "--requantize", "--no-check", "--json")
    assert done.code == 0, done.out
    assert "auto_map" not in json.loads((plain / "config.json").read_text()) and not list(plain.glob("*.py"))


def test_named_templates_are_written_verified_and_read(tmp_path: Path, cli) -> None:
    source = add_tokenizer(make_dense(tmp_path / "source", vocab=128), chat=True)
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "tool_use.jinja").write_text("{{ messages[0].content }}")
    done = cli("upcycle", source, tmp_path / "out", "--no-check", "--json")
    assert done.code == 0 and f"{TEMPLATES}/tool_use.jinja" in done.json["files"], done.out
    assert "tool_use" in load_tokenizer(tmp_path / "out").chat_template
    assert cli("verify", tmp_path / "out").code == 0
    (tmp_path / "out" / TEMPLATES / "tool_use.jinja").write_text("{{ 1 }}")
    assert cli("verify", tmp_path / "out").code == 5
    edit_json(tmp_path / "out" / "moeconv_manifest.json", files={"../config.json": {"sha256": "", "bytes": 1}})
    assert "is not valid" in cli("verify", tmp_path / "out").err


def test_links_in_the_templates_stay_inside_too(source: Path, tmp_path: Path) -> None:
    (source / TEMPLATES).mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / TEMPLATES / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leaves the checkpoint's directory"):
        find_companions(Checkpoint(source))
    (source / TEMPLATES / "x.jinja").unlink()
    (source / TEMPLATES).rmdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jinja").write_text("secret")
    (source / TEMPLATES).symlink_to(tmp_path / "folder")
    with pytest.raises(InputError, match="leaves the checkpoint's directory"):
        find_companions(Checkpoint(source))


@pytest.mark.parametrize("name", ["../x.jinja", f"{TEMPLATES}/../x.jinja", f"{TEMPLATES}/x.py", "a/tokenizer.json"])
def test_no_other_directory_is_part_of_a_checkpoint(name: str) -> None:
    assert not is_companion_name(name)


def test_a_companion_too_large_is_refused_without_reading_it(source: Path) -> None:
    with open(source / "tokenizer.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="too large"):
        find_companions(Checkpoint(source))


def test_a_sentencepiece_vocabulary_names_the_package_that_reads_it(tmp_path: Path, monkeypatch) -> None:
    source = make_dense(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr("moeconv.data.tokenizer._installed", lambda _package: False)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_tokenizer(source)
    assert "pip install sentencepiece protobuf" in caught.value.hint
