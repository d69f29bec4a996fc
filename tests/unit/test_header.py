"""The safetensors header and strict JSON: what is accepted, what is refused, and what comes back after a round trip."""

from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors
from tiny import safetensors_bytes, with_header

from moeconv.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    header_length,
    parse_header,
    serialise_header,
    tensor_nbytes,
)
from moeconv.checkpoint.strictjson import canonical_json, parse_json, read_json_object
from moeconv.errors import InputError, escape

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def parse(file: bytes):
    length = header_length(file[:8], file_size=len(file), file="f")
    return parse_header(file[8 : 8 + length], file_size=len(file), file="f")


def parse_entries(entries: object, data: bytes = b""):
    return parse(with_header(json.dumps(entries).encode(), data))


def test_a_file_made_by_hand_is_read_in_file_order():
    made = {"b": ("F32", (2, 3), bytes(range(24))), "a": ("BF16", (), b"\1\2"), "empty": ("I64", (0, 7), b"")}
    file = safetensors_bytes(made, format="pt", made="by hand")
    tensors, metadata = parse(file)
    assert metadata == {"format": "pt", "made": "by hand"}
    assert next(iter(tensors)) == "b" and set(tensors) == set(made)
    for name, (dtype, shape, data) in made.items():
        info = tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, len(data))
        assert file[info.start : info.end] == data


def test_what_we_serialise_the_library_reads():
    layout = [("x", "F64", (3,)), ("y", "BF16", (2, 5)), ("z", "U8", (1, 1, 3))]
    header, infos = serialise_header(layout, metadata={"format": "pt", "k": "v é"})
    data = bytes(range(sum(i.nbytes for i in infos.values())))
    read = dict(safetensors.deserialize(header + data))
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in read.items()} == {n: (d, s) for n, d, s in layout}
    for name, info in infos.items():
        assert bytes(read[name]["data"]) == data[info.start - len(header) : info.end - len(header)]


@pytest.mark.parametrize("names", [[], ["a"], ["a" * n for n in range(1, 12)]])
def test_data_starts_at_a_multiple_of_eight(names):
    header, infos = serialise_header((n, "F64", (1,)) for n in names)
    assert len(header) % 8 == 0
    assert all(info.start % 8 == 0 for info in infos.values())
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8


def test_a_name_twice_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="twice"):
        serialise_header([("a", "F32", (1,)), ("a", "F32", (1,))])
    with pytest.raises(ValueError, match="twice"):
        serialise_header([("__metadata__", "F32", (1,))])


def test_bytes_per_dtype():
    for dtype, bits in DTYPE_BITS.items():
        assert tensor_nbytes(dtype, (3, 8)) == 3 * bits
    assert tensor_nbytes("F32", ()) == 4
    assert tensor_nbytes("F4", (2,)) == 1
    with pytest.raises(ValueError, match="whole bytes"):
        tensor_nbytes("F4", (3,))


@pytest.mark.parametrize(
    ("entries", "data", "says"),
    [
        ([], b"", "not a JSON object"),
        ({"a": 1}, b"", "expected exactly"),
        ({"a": {**F32, "extra": 1}}, bytes(8), "expected exactly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "expected exactly"),
        ({"a": {**F32, "dtype": "F33"}}, bytes(8), "unknown dtype"),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "unknown dtype"),
        ({"a": {**F32, "shape": 2}}, bytes(8), "shape must be"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "shape must be"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "shape must be"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "shape must be"),
        ({"a": {**F32, "shape": [1] * 17}}, bytes(4), "shape must be"),
        ({"a": {**F32, "shape": [2**63]}}, bytes(8), "shape must be"),
        ({"a": {**F32, "data_offsets": [0]}}, bytes(8), "two non-negative"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8), "two non-negative"),
        ({"a": {**F32, "data_offsets": ["0", "8"]}}, bytes(8), "two non-negative"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "takes 8 bytes"),
        ({"a": {**F32, "data_offsets": [0, 12]}}, bytes(12), "takes 8 bytes"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1), "whole bytes"),
        ({"": F32}, bytes(8), "empty name"),
        ({"a\0b": F32}, bytes(8), "NUL"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "overlaps"),
        ({"a": F32, "b": F32}, bytes(8), "overlaps"),
        ({"a": F32, "b": {**F32, "data_offsets": [9, 17]}}, bytes(17), "leaves a gap"),
        ({"a": {**F32, "data_offsets": [1, 9]}}, bytes(9), "leaves a gap"),
        ({"a": F32}, bytes(7), "tensors end at byte"),
        ({"a": F32}, bytes(9), "tensors end at byte"),
        ({}, b"x", "tensors end at byte"),
        ({"__metadata__": {"a": 1}}, b"", "must map strings"),
        ({"__metadata__": "a"}, b"", "must map strings"),
    ],
)
def test_refused_headers(entries, data, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_entries(entries, data)
    assert caught.value.hint


def test_sizes_too_long_to_print_are_refused_too():
    digits = "9" * 4200
    text = f'{{"a":{{"dtype":"F32","shape":[{digits},{digits}],"data_offsets":[0,0]}}}}'
    with pytest.raises(InputError, match="shape must be"):
        parse(with_header(text.encode()))


@pytest.mark.parametrize("name", ["\x1b[2Jred", "new\nline", "\u202eevil", "\udcff"])
def test_names_cannot_paint_the_terminal(name):
    assert escape(name).isprintable()
    if name.isascii():
        with pytest.raises(InputError) as caught:
            parse_entries({name: {**F32, "dtype": name}}, bytes(8))
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("length", [9, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_never_read(length):
    with pytest.raises(InputError, match="the header claims"):
        header_length(struct.pack("<Q", length), file_size=16, file="f")


@pytest.mark.parametrize("size", range(8))
def test_files_shorter_than_the_length_field(size):
    with pytest.raises(InputError, match="too short"):
        header_length(bytes(size), file_size=size, file="f")


def test_a_git_lfs_pointer_is_named():
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    with pytest.raises(InputError) as caught:
        header_length(text[:8], file_size=len(text), file="f")
    assert "Git LFS" in caught.value.hint


# -- strict JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"x": {"a": 1, "a": 1}}', "duplicate key"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("[-Infinity]", "not JSON"),
        ("[1e999]", "out of range"),
        ("[-1e999]", "out of range"),
        ('["\\ud800"]', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        ("[" * 100_000, "too deeply"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        parse_json(text.encode(), what="x")


def test_json_that_is_no_utf8():
    with pytest.raises(InputError, match="not valid JSON"):
        parse_json(b'"\xff"', what="x")


def test_json_that_is_accepted():
    assert parse_json(b'{"a": [1, 2.5, "\\ud83d\\ude00", null, true]}', what="x") == {"a": [1, 2.5, "😀", None, True]}


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == b'{"a":[1.5,"\\u00e9"],"b":1}'
    assert canonical_json([math.inf, -math.inf]) == b"[Infinity,-Infinity]"


def test_read_json_object(tmp_path):
    file = tmp_path / "c.json"
    with pytest.raises(InputError, match="x is missing"):
        read_json_object(file, what="x")
    file.write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        read_json_object(file, what="x")
    with pytest.raises(InputError, match="cannot read"):
        read_json_object(tmp_path, what="x")
    file.write_text('{"a": 1}')
    assert read_json_object(file, what="x") == {"a": 1}
    file.write_text('{"a": [0.0, Infinity], "b": 1e999}')
    with pytest.raises(InputError, match="Infinity is not JSON"):
        read_json_object(file, what="x")
    assert read_json_object(file, what="x", constants=True) == {"a": [0.0, math.inf], "b": math.inf}


def test_entries_in_any_form_are_read_alike():
    """The form that the safetensors library writes has a path of its own; other valid JSON gives the same tensors."""
    usual = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    )

    def read(text: bytes) -> list[tuple[object, ...]]:
        tensors, metadata = parse_header(text, file_size=8 + len(text) + 9, file="f")
        assert metadata == {"format": "pt"}
        return [(name, r.name, r.dtype, r.shape, r.start - 8 - len(text), r.nbytes) for name, r in tensors.items()]

    assert read(usual) == [("a", "a", "F32", (2, 1), 0, 8), ("b", "b", "U8", (), 8, 1)]
    assert read(json.dumps(json.loads(usual), indent=1).encode()) == read(usual)
    assert read(usual.replace(b'"a"', b'"\\u0061"')) == read(usual)
    assert read(usual.replace(b'"dtype":"F32","shape":[2,1]', b'"shape":[2,1],"dtype":"F32"')) == read(usual)


@pytest.mark.parametrize(
    "wrong",
    [
        b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"b":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,9]}}',
        b'{"a":{"dtype":"X32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_entries_in_the_usual_form_are_checked_as_strictly(wrong):
    with pytest.raises(InputError):
        parse_header(wrong, file_size=8 + len(wrong) + 8, file="f")
