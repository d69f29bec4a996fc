"""Text -> windows of tokens: which files are read and how, seeded sampling by weight, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from words import SPECIAL, WORDS, add_tokenizer, text

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
        ("list.jsonl", b"[1, 2]", "list.jsonl, line 1: not a JSON object"),
        ("field.jsonl", b'{"body": "w1"}', r"field.jsonl, line 1: no text in field 'text' \(fields: body\)"),
        ("number.jsonl", b'{"text": 7}', "line 1: no text in field 'text'"),
        ("roles.jsonl", b'{"messages": [{"content": "w1"}]}', "line 1: no text in field 'text'"),
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
    with pytest.raises(InputError, match="tokenizer of damaged does not load"):
        load(damaged, tmp_path / "a.txt")


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
    with pytest.raises(InputError, match=r"o/n, record 1: no text in field 'text' \(fields: body\)"):
        load(model, "hf://datasets/o/n")
    hub["o/n", None, "train"] = []
    with pytest.raises(InputError, match="no records"):
        load(model, "hf://datasets/o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds when it is not installed
    with pytest.raises(InputError, match="needs the package `datasets`") as caught:
        load(model, "hf://datasets/o/n")
    assert "pip install" in caught.value.hint
