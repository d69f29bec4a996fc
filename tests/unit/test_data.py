"""Text -> windows of tokens: which files are read and how, seeded sampling by weight, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from words import CHAT_TEMPLATE, SPECIAL, WORDS, add_tokenizer, text

from moeconv.data.recognise import parse_texts
from moeconv.data.records import Chat
from moeconv.data.texts import split_weight
from moeconv.data.tokenizer import same_tokenizer
from moeconv.data.windows import load_tokens, share_out
from moeconv.errors import InputError, UsageError

EOS = SPECIAL.index("</s>")


def ids_of(words: str) -> list[int]:
    return [len(SPECIAL) + WORDS.index(w) for w in words.split()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tmp_path_factory.mktemp("model"), chat=True)


def load(model: Path, *paths: object, tokens: int | None = None, seq_len: int = 8, seed: int = 0, **more: str):
    return load_tokens([str(p) for p in paths], model, tokens=tokens, seq_len=seq_len, seed=seed, **more)


def test_a_text_is_tokenized_whole_and_cut_into_full_windows(model: Path, tmp_path: Path) -> None:
    words = text(27)
    (tmp_path / "a.txt").write_text(words)
    data = load(model, tmp_path / "a.txt")
    assert data.windows.dtype == np.int64
    assert data.windows.tolist() == np.reshape(ids_of(words)[:24], (3, 8)).tolist()  # the tail of 3 is left out
    assert data.source.tolist() == [0, 0, 0]
    (source,) = data.sources
    assert (source.name, source.tokens) == ("a.txt", 24)
    assert source.sha256 == hashlib.sha256(words.encode()).hexdigest()


def test_records_of_a_jsonl_are_joined_with_the_end_token(model: Path, tmp_path: Path) -> None:
    records = ["w1 w2", "w3", "w4 w5 w6"]
    lines = [json.dumps({"text": r, "id": i}) for i, r in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    expected = [*ids_of("w1 w2"), EOS, *ids_of("w3"), EOS, *ids_of("w4 w5 w6")]
    assert load(model, tmp_path / "a.jsonl").windows.tolist() == [expected]


def test_text_field_and_chat_messages(model: Path, tmp_path: Path) -> None:
    (tmp_path / "body.jsonl").write_text(json.dumps({"body": "w1 w2", "text": "w9 w9 w9"}))
    assert load(model, tmp_path / "body.jsonl", seq_len=2, text_field="body").windows.tolist() == [ids_of("w1 w2")]
    messages = [{"role": "w7", "content": "w1 w2"}, {"role": "w8", "content": "w3"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    expected = [ids_of("w7 w1 w2 w8 w3")]  # the template writes role and content
    assert load(model, tmp_path / "chat.jsonl", seq_len=5).windows.tolist() == expected
    assert load(model, tmp_path / "chat.jsonl", seq_len=5, text_field="messages").windows.tolist() == expected


def test_a_directory_is_one_source_of_its_text_files_in_order(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.jsonl").write_text(json.dumps({"text": "w3 w4"}))
    (folder / "a.txt").write_text("w1 w2")
    (folder / "notes.bin").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("w5")
    data = load(model, folder, seq_len=5)
    assert data.windows.tolist() == [[*ids_of("w1 w2"), EOS, *ids_of("w3 w4")]]
    assert [s.name for s in data.sources] == ["corpus"]


def test_standard_input(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"w1 w2 w3 w4")))
    data = load(model, "-", seq_len=2)
    assert data.windows.tolist() == [ids_of("w1 w2"), ids_of("w3 w4")]
    assert data.sources[0].name == "-"
    with pytest.raises(UsageError, match="twice"):
        load(model, "-", "-")


def test_sampling_is_seeded_without_replacement_and_by_weight(model: Path, tmp_path: Path) -> None:
    # every window of 2 holds a word once, so that windows can be told apart
    (tmp_path / "a.txt").write_text(" ".join(WORDS[:40]))
    (tmp_path / "b.txt").write_text(" ".join(WORDS[20:]))
    paths = [f"{tmp_path / 'a.txt'}=3", str(tmp_path / "b.txt")]
    data = load(model, *paths, tokens=17, seq_len=2, seed=1)
    assert data.windows.shape == (8, 2)  # 17 tokens are 8 windows
    assert data.source.tolist() == [0] * 6 + [1] * 2
    assert [s.tokens for s in data.sources] == [12, 4]
    for i in range(2):
        starts = data.windows[data.source == i][:, 0].tolist()
        assert starts == sorted(set(starts))  # in order of the text, none twice
    again = load(model, *paths, tokens=17, seq_len=2, seed=1)
    other = load(model, *paths, tokens=17, seq_len=2, seed=2)
    assert np.array_equal(data.windows, again.windows)
    assert not np.array_equal(data.windows, other.windows)
    everything = load(model, *paths, tokens=1000, seq_len=2)
    assert np.array_equal(everything.windows, load(model, *paths, seq_len=2).windows)


def test_share_out_meets_the_total_and_the_limits() -> None:
    assert share_out([10, 10, 3], [1, 1, 1], 15) == [6, 6, 3]
    assert share_out([10, 10], [3, 1], 8) == [6, 2]
    assert share_out([2, 10], [3, 1], 8) == [2, 6]
    assert share_out([5, 5], [1, 1], 20) == [5, 5]
    assert share_out([10, 10, 10], [1, 1, 1], 4) == [2, 1, 1]
    for total in range(31):
        shares = share_out([4, 7, 20], [0.3, 5.0, 1.0], total)
        assert sum(shares) == total
        assert all(0 <= s <= limit for s, limit in zip(shares, [4, 7, 20]))


def test_split_weight(tmp_path: Path) -> None:
    odd = tmp_path / "a=2"
    odd.write_text("x")
    assert split_weight("a.txt=0.5") == ("a.txt", 0.5)
    assert split_weight("a.txt") == ("a.txt", 1.0)
    assert split_weight(str(odd)) == (str(odd), 1.0)  # a file of that name
    assert split_weight("a.txt=b") == ("a.txt=b", 1.0)
    for bad in ("a=0", "a=-1", "a=nan", "a=inf"):
        with pytest.raises(UsageError, match="weight"):
            split_weight(bad)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n\n", "empty.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("latin.txt", b"w1 \xe9 w2", r"latin.txt is not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b'{"text": "w1"}\n\n{"text": w2}\n', "bad.jsonl, line 3: not valid JSON"),
        ("list.jsonl", b"[1, 2]", "list.jsonl, line 1 is not a JSON object"),
        ("field.jsonl", b'{"body": "w1"}', r"field.jsonl, line 1: no text in the field 'text' \(fields: body\)"),
        ("number.jsonl", b'{"text": 7}', "line 1: no text in the field 'text'"),
        ("roles.jsonl", b'{"messages": [{"content": "w1"}]}', "line 1: no text in the field 'text'"),
        ("short.txt", b"w1 w2 w3", "short.txt has 3 tokens, less than one sequence of 8"),
    ],
)
def test_unusable_files_are_named(model: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(model, tmp_path / name)


def test_unusable_values(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(20))
    with pytest.raises(InputError, match="does not exist"):
        load(model, tmp_path / "nothing.txt")
    with pytest.raises(InputError, match=r"no \.txt"):
        load(model, add_tokenizer(tmp_path / "folder"))
    with pytest.raises(UsageError, match="no data"):
        load(model)
    with pytest.raises(UsageError, match="less than one sequence"):
        load(model, tmp_path / "a.txt", tokens=7)
    with pytest.raises(UsageError, match="at least 2"):
        load(model, tmp_path / "a.txt", seq_len=1)


def test_a_checkpoint_without_a_usable_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(20))
    bare, damaged = tmp_path / "bare", tmp_path / "damaged"
    bare.mkdir()
    with pytest.raises(InputError, match="bare has no tokenizer") as caught:
        load(bare, tmp_path / "a.txt")
    assert "tokenizer.json" in caught.value.hint
    add_tokenizer(damaged)
    (damaged / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="tokenizer of damaged cannot be loaded"):
        load(damaged, tmp_path / "a.txt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        broken = add_tokenizer(tmp_path / name.partition(".")[0])
        (broken / name).write_text("{\n oops")
        with pytest.raises(InputError, match=rf"cannot be loaded: {name} is not valid JSON \(.*line 2"):
            load(broken, tmp_path / "a.txt")


def test_chats_need_a_template(tmp_path: Path) -> None:
    plain = add_tokenizer(tmp_path / "plain")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}))
    with pytest.raises(InputError, match="no chat template"):
        load(plain, tmp_path / "chat.jsonl")


def test_same_tokenizer(tmp_path: Path) -> None:
    one, two = add_tokenizer(tmp_path / "one"), add_tokenizer(tmp_path / "two")
    other = add_tokenizer(tmp_path / "other", words=WORDS[:-1])
    assert same_tokenizer(one, two)
    (two / "tokenizer.json").write_text((two / "tokenizer.json").read_text() + "\n")
    assert same_tokenizer(one, two)  # other bytes, same vocabulary
    assert not same_tokenizer(one, other)


# -- hub data sets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[dict]]:
    """A stand-in for the `datasets` package: what is put in the dict is what the hub has."""
    shelf: dict[tuple[str, str | None, str], list[dict]] = {}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool):
        assert streaming
        if (name, config, split) not in shelf:
            raise ValueError(f"Unknown split {split!r}\nand more lines")
        return iter(shelf[name, config, split])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return shelf


def test_hub_data_sets(model: Path, tmp_path: Path, hub) -> None:
    hub["o/n", None, "train"] = [{"text": "w1 w2"}, {"text": "w3"}]
    hub["o/n", "en", "train"] = [{"text": "w4 w5", "url": None}]
    hub["o/n", "en", "test"] = [{"messages": [{"role": "w7", "content": "w1 w2"}]}]
    data = load(model, "hf://datasets/o/n", seq_len=4)
    assert data.windows.tolist() == [[*ids_of("w1 w2"), EOS, *ids_of("w3")]]
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in hub["o/n", None, "train"])
    assert (data.sources[0].name, data.sources[0].sha256) == ("o/n", hashlib.sha256(lines).hexdigest())
    (tmp_path / "a.txt").write_text("w9 w9")
    both = load(model, "hf://datasets/o/n:en=2", "hf://datasets/o/n:en:test", tmp_path / "a.txt", seq_len=2)
    assert [(s.name, s.weight) for s in both.sources] == [("o/n:en", 2.0), ("o/n:en:test", 1.0), ("a.txt", 1.0)]
    assert both.windows.tolist() == [ids_of("w4 w5"), ids_of("w7 w1"), ids_of("w9 w9")]
    assert load(model, "hf://datasets/o/n:en:train", seq_len=2).windows.tolist() == [ids_of("w4 w5")]


def test_of_a_large_hub_data_set_only_the_front_is_fetched(model: Path, hub) -> None:
    fetched = []
    hub["o/n", None, "train"] = ({"text": text(8, seed=fetched.append(i) or i)} for i in range(10**6))  # type: ignore
    data = load(model, "hf://datasets/o/n", tokens=64)
    assert data.tokens == 64 and 64 // 8 < len(fetched) < 200


def test_hub_data_sets_that_cannot_be_read(model: Path, hub, monkeypatch) -> None:
    for value in ("hf://o/n", "hf://datasets/n", "hf://datasets/o/n:a:b:c"):
        with pytest.raises(UsageError, match=r"is not hf://datasets/OWNER/NAME"):
            load(model, value)
    with pytest.raises(InputError, match=r"cannot read hf://datasets/o/n: Unknown split 'train'$"):
        load(model, "hf://datasets/o/n")
    hub["o/n", None, "train"] = [{"body": "w1"}]
    with pytest.raises(InputError, match=r"o/n, record 1: no text in the field 'text' \(fields: body\)"):
        load(model, "hf://datasets/o/n")
    hub["o/n", None, "train"] = []
    with pytest.raises(InputError, match="no records"):
        load(model, "hf://datasets/o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds when it is not installed
    with pytest.raises(InputError, match="needs the package `datasets`") as caught:
        load(model, "hf://datasets/o/n")
    assert "pip install" in caught.value.hint


# -- what a file holds decides how it is read --------------------------------------------------------------------------

RECORDS = [{"id": 1, "text": "w1 w2"}, {"id": 2, "text": "w3 w4"}]
AS_RECORDS = [[*ids_of("w1 w2"), EOS, *ids_of("w3 w4")]]
LINES = "\n".join(map(json.dumps, RECORDS))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (json.dumps(RECORDS), ("a.json", "a.txt", "a.jsonl", "a")),
        (json.dumps(RECORDS, indent=2), ("a.json", "a.txt")),
        (json.dumps(["w1 w2", "w3 w4"]), ("a.json", "a.txt")),
        (json.dumps({"version": 1, "data": RECORDS}), ("a.json", "a.txt")),
        (json.dumps({"text": {"0": "w1 w2", "1": "w3 w4"}, "id": {"0": 1, "1": 2}}), ("a.json",)),
        (json.dumps({"text": ["w1 w2", "w3 w4"], "id": [1, 2]}), ("a.json",)),
        (LINES, ("a.jsonl", "a.json", "a.txt", "a")),
        ("\ufeff" + LINES, ("a.jsonl", "a.txt")),
        ("id,text\n1,w1 w2\n2,w3 w4\n", ("a.csv", "a.txt", "a")),
        ('\ufeffid,text\r\n1,"w1\r\nw2"\r\n2,w3 w4\r\n', ("a.csv", "a.txt")),
        ("id\ttext\n1\tw1 w2\n2\tw3 w4\n", ("a.tsv", "a.csv", "a.txt")),
        ("id;text\n1;w1 w2\n2;w3 w4\n", ("a.csv",)),
        ("text\nw1 w2\nw3 w4\n", ("a.csv",)),
    ],
)
def test_records_are_recognised_by_content(model: Path, tmp_path: Path, monkeypatch, content, names) -> None:
    for name in names:
        (tmp_path / name).write_text(content, newline="")
        assert load(model, tmp_path / name, seq_len=5).windows.tolist() == AS_RECORDS, name
    if "a" in names:  # without a suffix: so also on standard input
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        assert load(model, "-", seq_len=5).windows.tolist() == AS_RECORDS


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read(model: Path, tmp_path: Path, pack) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(pack(LINES.encode()))  # its first bytes say how, not its name
    assert load(model, tmp_path / "a.jsonl.gz", seq_len=5).windows.tolist() == AS_RECORDS
    (tmp_path / "b.txt").write_bytes(pack(b"w1 w2"))
    assert load(model, tmp_path / "b.txt", seq_len=2).windows.tolist() == [ids_of("w1 w2")]


@pytest.mark.parametrize(
    "content",
    [
        "[w1] w2 w3 w4 w5",
        "{w1} w2 w3 w4 w5",
        '{"w1": w2',
        '[{"text": "w1 w2"}, {"text": "w3',  # cut off
        '{"text": "w1"} is how a record looks\nw2\nw3',
        "[1, 2, 3, 4, 5]",
        "text, w1, w2\nw3 w4",
        "id,text\nw1, w2, w3\nw4",
        "ORC w1 w2 w3 w4",
        "\ufeffw1 w2 w3 w4",
    ],
)
def test_a_text_that_only_begins_like_data_stays_text(model: Path, tmp_path: Path, content: str) -> None:
    assert parse_texts(content.encode(), "a.txt", "text") == (content,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", b'[{"text": "w1 w2"}, {"text": "w3', "cut.json: not valid JSON"),
        ("cut", b'[{"text": "w1 w2"}, {"text": "w3', "cut begins as JSON: not valid JSON"),
        ("lines.txt", f"{LINES}\n{LINES[:9]}".encode(), "lines.txt, line 3: not valid JSON"),
        ("list.json", b'[{"body": "w1"}]', r"list.json, record 1: no text in the field 'text' \(fields: body\)"),
        ("object.txt", b'{"body": "w1"}', r"object.txt: no text in the field 'text' \(fields: body\)"),
        ("lists.json", b'{"train": [{"text": "w1"}], "test": [{"text": "w2"}]}', "several lists .train, test"),
        ("numbers.json", b"[1, 2]", "numbers.json is JSON without records"),
        ("scalar.json", b'"w1 w2"', "scalar.json is JSON without records"),
        ("columns.csv", b"id,body\n1,w1\n", r"columns.csv: no column 'text' \(columns: id, body\)"),
        ("ragged.csv", b"id,text\n1,w1,w2\n", "ragged.csv, line 2: the row has 3 cells, and the header has 2"),
        ("ragged", b"id,text\n1,w1,w2\n", "ragged, line 2: the row has 3 cells"),
        ("bare.csv", b"id,text\n", "bare.csv is empty: a header without rows"),
        ("chat.csv", b"id,messages\n1,\"[{'role': 'user'}]\"\n", "chat.csv, line 2: .* is not valid JSON"),
        ("wide.txt", "w1 w2".encode("utf-16"), "wide.txt is UTF-16 text"),
        ("a.zip", b"PK\x03\x04....", "a.zip is a zip archive"),
        ("a.pdf", b"%PDF-1.7", "a.pdf is a PDF document"),
        ("cut.gz", gzip.compress(LINES.encode())[:-9], "cut.gz: the gzip data cannot be decompressed"),
        ("tar.gz", gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 250), "tar.gz is a tar archive"),
        ("a.parquet", b"PAR1 nothing PAR1", "a.parquet is a Parquet file, and the package `pyarrow`"),
        ("a.zst", b"\x28\xb5\x2f\xfd....", "a.zst is compressed by zstd, and the package `zstandard`"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_data_that_cannot_be_read_is_said_to_be_what_it_is(model, tmp_path, monkeypatch, name, content, message):
    for package in ("pyarrow", "zstandard", "compression"):
        monkeypatch.setitem(sys.modules, package, None)  # what an import finds when it is not installed
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(model, tmp_path / name)
    assert caught.value.hint


def test_parquet(model: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert load(model, tmp_path / "a.parquet", seq_len=5).windows.tolist() == AS_RECORDS
    chats = [{"conversations": [{"from": "human", "value": "w1"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "b.parquet")
    (chat,) = parse_texts((tmp_path / "b.parquet").read_bytes(), "b.parquet", "text")
    assert isinstance(chat, Chat) and chat.messages == [{"role": "user", "content": "w1"}]
    with pytest.raises(InputError, match=r"no column 'body' \(columns: id, text\)"):
        load(model, tmp_path / "a.parquet", text_field="body")


def test_zstd(model: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES.encode()))
    assert load(model, tmp_path / "a.jsonl.zst", seq_len=5).windows.tolist() == AS_RECORDS


def test_a_file_that_unpacks_to_more_than_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("moeconv.data.unpack.MAX_UNPACKED", 1 << 20)
    with pytest.raises(InputError, match="decompresses to more than"):
        parse_texts(gzip.compress(bytes(1 << 21)), "zeros.gz", "text")


def test_a_directory_does_not_hide_data_behind_its_notes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text(20))
    (tmp_path / "train.json").write_text(json.dumps(RECORDS))
    with pytest.raises(InputError, match=r"README.md is beside data files \(train.json\)"):
        load(model, tmp_path)
    (tmp_path / "a.txt").write_text(text(20))
    assert load(model, tmp_path).tokens == 40
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "b.csv").write_text("id,text\n1,w1\n")
    with pytest.raises(InputError, match=r"no \.txt") as caught:
        load(model, tmp_path / "only")
    assert "b.csv" in caught.value.hint


def test_conversations_of_sharegpt_go_through_the_template(model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    record = {"system": "w9", "conversations": turns}
    expected = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]
    expected += [{"role": "assistant", "content": "w3"}]
    for name, content in (("a.jsonl", json.dumps(record)), ("a.json", json.dumps([record])), ("a", json.dumps(record))):
        (chat,) = parse_texts(content.encode(), name, "text")
        assert isinstance(chat, Chat) and chat.messages == expected
    (bare,) = parse_texts(json.dumps([turns]).encode(), "a.json", "text")
    assert isinstance(bare, Chat) and bare.messages == expected[1:]
    (tmp_path / "a.csv").write_text('conversations\n"' + json.dumps(turns).replace('"', '""') + '"\n')
    assert load(model, tmp_path / "a.csv", seq_len=5).tokens == 5  # w1 w2 w3 and the two roles
    turns[0]["from"] = "narrator"
    with pytest.raises(InputError, match=r"a.jsonl, line 2: `from` is no known role: 'narrator'"):
        parse_texts(f"{LINES[: LINES.index(chr(10))]}\n{json.dumps(record)}".encode(), "a.jsonl", "text")


def test_a_record_that_the_template_refuses_names_its_file_and_line(tmp_path: Path) -> None:
    model = add_tokenizer(tmp_path / "model", chat=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    first = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": first + CHAT_TEMPLATE}))
    records = [{"messages": [{"role": role, "content": "w1"}]} for role in ("user", "assistant")]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for path, where in ((tmp_path / "corpus", "a.jsonl, line 3"), (tmp_path / "a.json", "a.json, record 2")):
        with pytest.raises(InputError, match=f"^{where}: the chat template does not accept the record: user first"):
            load(model, path)
