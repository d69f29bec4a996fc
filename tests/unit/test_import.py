"""import: our GGUF files become the checkpoints that they were made from; foreign and damaged files get a verdict."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from unit.test_gguf import floats, make, sentencepiece, tokenizer, write

from moeconv.checkpoint.gguf import open_gguf
from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.data.tokenizer import load_tokenizer
from moeconv.errors import InputError, Unsupported
from moeconv.importing.planner import plan_import
from moeconv.options import ImportOptions

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
DENSE = ("llama", "mistral", "qwen2", "qwen3")


def source_of(path: Path, family: str) -> Path:
    """A tiny model with a tokenizer."""
    if family in DENSE:
        return tokenizer(tiny.make_dense(path, family, hidden=64, intermediate=128))
    return make(path, family, intermediate=128)


@pytest.mark.parametrize("family", FAMILIES + DENSE)
def test_the_weights_come_back_bit_for_bit(tmp_path, cli, family):
    source = source_of(tmp_path / "source", family)
    write(source, tmp_path / "f32", scheme="f32")
    done = cli("import", tmp_path / "f32" / "model.gguf", tmp_path / "back", "--dtype", "float32", "--json")
    assert done.code == 0, done
    assert done.json["bytes"] == sum(f.stat().st_size for f in (tmp_path / "back").glob("*.safetensors"))
    before, after = tiny.read_tensors(source), tiny.read_tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, (dtype, shape, data) in before.items():
        kind, form, values = after[name]
        assert (kind, form) == ("F32", shape)
        np.testing.assert_array_equal(tiny.decode(values, kind, form), tiny.decode(data, dtype, shape), err_msg=name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_decoded_weights_survive_another_export(tmp_path, cli, family):
    """q8_0 -> import in float32 -> f32: the tensors of both files decode to the same bits."""
    write(source_of(tmp_path / "source", family), tmp_path / "q8", scheme="q8_0")
    assert cli("import", tmp_path / "q8" / "model.gguf", tmp_path / "back", "--dtype", "float32").code == 0
    write(tmp_path / "back", tmp_path / "again", scheme="f32")
    first, second = (
        {t.name: floats(t) for t in open_gguf(tmp_path / name / "model.gguf").tensors} for name in ("q8", "again")
    )
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def test_the_config_is_the_sources(tmp_path, cli):
    source = source_of(tmp_path / "source", "qwen3_moe")
    write(source, tmp_path / "gguf", scheme="q8_0")
    file = tmp_path / "gguf" / "model.gguf"
    assert cli("import", file, tmp_path / "back").code == 0
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "back"))
    same = ("model_type", "hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "rms_norm_eps",
            "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")  # fmt: skip
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    described = cli("inspect", file, "--json").json
    assert described["model_type"] == "qwen3_moe" and described["num_experts"] == before["num_experts"]
    assert described["quantization"]["format"] == "gguf"
    planned = cli("import", file, tmp_path / "no", "--dry-run", "--json").json
    assert planned["dry_run"] and not (tmp_path / "no").exists()
    assert planned["bytes"] == sum(f.stat().st_size for f in (tmp_path / "back").glob("*.safetensors"))
    assert cli("verify", tmp_path / "back").code == 0


def complete(path: Path) -> None:
    """Every field that the tokenizers package needs."""
    value = json.loads((path / "tokenizer.json").read_text())
    value |= {key: value.get(key) for key in ("truncation", "padding", "post_processor", "decoder")}
    value["pre_tokenizer"] = value["pre_tokenizer"] and {"trim_offsets": True} | value["pre_tokenizer"]
    value["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in value["model"]["merges"]]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    value["added_tokens"] = [dict.fromkeys(flags, False) | token for token in value["added_tokens"]]
    (path / "tokenizer.json").write_text(json.dumps(value))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokenizers_come_back(tmp_path, cli, kind):
    words = tiny.make_moe(tmp_path / "source", "mixtral", hidden=64, intermediate=128, vocab=128)
    source = tokenizer(words, size=128)
    if kind == "sentencepiece":
        source = sentencepiece(tiny.make_moe(tmp_path / "words", "mixtral", hidden=64, intermediate=128, vocab=300))
    complete(source)
    write(source, tmp_path / "gguf", scheme="q8_0")
    assert cli("import", tmp_path / "gguf" / "model.gguf", tmp_path / "back").code == 0
    one, other = load_tokenizer(source), load_tokenizer(tmp_path / "back")
    letters = "abcdefgh  "
    draw = random.Random(0)
    texts = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 40))) for _ in range(50)]
    for text in texts:
        ids = [t(text, add_special_tokens=False)["input_ids"] for t in (one, other)]
        assert ids[0] == ids[1], text


def test_damaged_files_get_a_verdict(tmp_path):
    """Cut anywhere, or with changed bytes in front of the tensors: an InputError, or a plan that checks."""
    write(source_of(tmp_path / "source", "mixtral"), tmp_path / "gguf", scheme="q8_0")
    data = (tmp_path / "gguf" / "model.gguf").read_bytes()
    begin = min(t.data_offset for t in open_gguf(tmp_path / "gguf" / "model.gguf").tensors)
    draw, refused = random.Random(1), 0
    broken = [data[: draw.randrange(len(data))] for _ in range(12)]
    for _ in range(40):
        at = draw.randrange(int(begin))
        broken.append(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
    for number, changed in enumerate(broken):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            plan_import(GgufSource(path), ImportOptions())
        except InputError as error:
            assert error.message and error.hint
            refused += 1
        path.unlink()
    assert refused >= 12


def test_what_is_no_file_of_ours_is_refused(tmp_path, cli):
    (tmp_path / "a.gguf").write_bytes(b"nothing of the kind")
    for name, says in (("a.gguf", "not a GGUF file"), ("b.gguf", "cannot read")):
        done = cli("import", tmp_path / name, tmp_path / "out", "--json")
        assert done.code == 3 and says in done.json["error"]["message"]
        assert not (tmp_path / "out").exists()


def edited(file: Path, out: Path, changes: dict, drop: tuple[str, ...] = (), factors: object = None) -> Path:
    """A copy of a GGUF file with other metadata, and maybe with the tensor rope_freqs.weight."""
    gguf = pytest.importorskip("gguf")
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *drop, *changes):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for key, value in changes.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A file of llama."""
    folder = tmp_path_factory.mktemp("llama")
    write(source_of(folder / "source", "llama"), folder / "gguf", scheme="f32")
    return folder / "gguf" / "model.gguf"


def test_an_edited_copy_is_imported(tmp_path, llama):
    plan, _ = plan_import(GgufSource(edited(llama, tmp_path / "same.gguf", {})), ImportOptions())
    assert plan.config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.logit_scale", 0.25),
        ("llama.attention.scale", 0.5),
        ("llama.attention.sliding_window", 16),
        ("llama.rope.scaling.attn_factor", 2.0),
        ("llama.attention.causal", False),
        ("llama.something.new", 1),
        ("llama.rope.dimension_count", 4),
    ],
)
def test_a_setting_that_the_model_would_not_have_is_refused(tmp_path, cli, llama, key, value):
    file = edited(llama, tmp_path / "a.gguf", {key: value})
    done = cli("import", file, tmp_path / "out", "--json")
    assert done.code == 3 and key in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.count", "x"),
        ("split.count", [1, 2]),
        ("llama.attention.key_length", "x"),
        ("llama.attention.key_length", [8, 8]),
        ("llama.attention.head_count", 4.5),
        ("llama.attention.head_count", 0),
        ("llama.expert_count", "x"),
        ("llama.rope.freq_base", float("inf")),
        ("tokenizer.ggml.bos_token_id", "x"),
        ("tokenizer.ggml.bos_token_id", 999999),
        ("tokenizer.ggml.add_eos_token", "x"),
    ],
)
def test_metadata_of_another_kind_is_rejected(tmp_path, cli, llama, key, value):
    file = edited(llama, tmp_path / "a.gguf", {key: value})
    done = cli("import", file, tmp_path / "out", "--json")
    assert done.code == 3 and key in done.json["error"]["message"], done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
def test_the_factors_of_llama3_are_read(tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    source = source_of(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    theta = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    (source / "config.json").write_text(json.dumps(theta | {"rope_parameters": rope}))
    write(source, tmp_path / "gguf", scheme="f32")
    file = GgufSource(tmp_path / "gguf" / "model.gguf")
    if factor == 16.0:
        with pytest.raises(Unsupported, match=r"rope_freqs.weight"):
            plan_import(file, ImportOptions())
    else:
        assert plan_import(file, ImportOptions())[0].config["rope_parameters"] == rope


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, (True, False)),
        ({"tokenizer.ggml.pre": "qwen2"}, (False, False)),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, (False, False)),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_eos_token": True}, (False, True)),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_eos_token": True}, (True, True)),
    ],
)
def test_tokens_around_texts_are_those_of_llama_cpp(tmp_path, changes, around):
    source = tiny.make_dense(tmp_path / "source", "llama", hidden=64, intermediate=128, vocab=128)
    write(tokenizer(source, size=128), tmp_path / "gguf", scheme="f32")
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    dropped = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    file = edited(tmp_path / "gguf" / "model.gguf", tmp_path / "a.gguf", ids | changes, dropped)
    plan, _ = plan_import(GgufSource(file), ImportOptions())
    for name, text in plan.texts.items():
        (tmp_path / name).write_text(text)
    made = load_tokenizer(tmp_path)
    found = made("ab")["input_ids"]
    inner = made("ab", add_special_tokens=False)["input_ids"]
    assert found == [1] * around[0] + inner + [2] * around[1]
