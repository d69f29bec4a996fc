"""What must hold for any input: round trips, errors of the right kind, sizes that fit, bytes that luck does not touch.

MOECONV_EXAMPLES multiplies the number of examples and draws new ones; without it the run is the same each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_dense, make_moe, read_file, read_tensors, safetensors_bytes, with_header

from moeconv.checkpoint import blocks
from moeconv.checkpoint.header import DTYPE_BITS, parse_header, serialise_header, tensor_nbytes
from moeconv.checkpoint.reader import INDEX_NAME, Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.strictjson import canonical_json, parse_json
from moeconv.checkpoint.writer import ShardWriter
from moeconv.cli.stdin import model_from_stdin
from moeconv.errors import InputError, MoeconvError, UsageError, escape
from moeconv.families.model import open_model
from moeconv.inspect.run import inspect
from moeconv.options import parse_layers, parse_size
from moeconv.plan.build import pick_rows
from moeconv.plan.execute import execute, parse_part
from moeconv.plan.plan import Item, TensorSpec, pack_shards
from moeconv.prune.planner import plan_prune
from moeconv.quantize.planner import plan_quantize
from moeconv.upcycle.planner import plan_upcycle
from moeconv.verify.run import verify

FACTOR = int(os.environ.get("MOECONV_EXAMPLES", "0"))


def examples(n: int):
    return settings(
        max_examples=n * max(1, FACTOR), derandomize=not FACTOR, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = text.filter(lambda n: n and "\0" not in n and n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
layouts = st.lists(
    st.tuples(names, st.sampled_from(sorted(DTYPE_BITS)), shapes).filter(
        lambda t: not any(DTYPE_BITS[t[1]] * x % 8 for x in [_product(t[2])])
    ),
    max_size=8, unique_by=lambda t: t[0],
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for x in shape:
        n *= x
    return n


def file_from(data: bytes) -> SafetensorsFile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        path.write_bytes(data)
        return SafetensorsFile(path)


# -- headers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@examples(100)
@given(layouts, st.dictionaries(text, text, max_size=3))
def test_header_round_trip(layout, metadata):
    header, infos = serialise_header(layout, metadata=metadata or {"format": "pt"})
    size = len(header) + sum(tensor_nbytes(d, s) for _, d, s in layout)
    parsed, found = parse_header(header[8:], file_size=size, file="f")
    assert parsed == infos and found == (metadata or {"format": "pt"})
    library = dict(safetensors.deserialize(header + bytes(size - len(header))))
    assert set(library) == {n for n, _, _ in layout}


@examples(200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_input_error(data):
    with pytest.raises(InputError):
        file_from(data)
    with pytest.raises(InputError):
        parse_header(data, file_size=8 + len(data) + 1, file="f")


@examples(200)
@given(json_values, st.binary(max_size=30))
def test_arbitrary_json_as_a_header(value, data):
    try:
        file = file_from(with_header(json.dumps(value).encode(), data))
    except InputError:
        return
    assert sum(t.nbytes for t in file.tensors.values()) == len(data)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "x"]) | json_values,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


@pytest.mark.slow
@examples(300)
@given(st.dictionaries(text, entries, max_size=3), st.binary(max_size=40))
def test_plausible_headers_tile_the_file_or_are_refused(value, data):
    raw = with_header(json.dumps(value).encode(), data)
    try:
        file = file_from(raw)
    except InputError as error:
        assert error.message.isprintable()
        return
    spans = sorted((t.start, t.end) for t in file.tensors.values())
    position = len(raw) - len(data)
    for start, end in spans:
        assert start == position
        position = end
    assert position == len(raw)


WHOLE = safetensors_bytes({"a": ("F32", (2, 3), bytes(24)), "b": ("BF16", (5,), bytes(10)), "c": ("U8", (0,), b"")})


@examples(300)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(WHOLE)))
def test_damage_to_a_valid_file(flips, cut):
    data = bytearray(WHOLE)
    for at, byte in flips:
        data[at] = byte
    damaged = bytes(data[:cut])
    try:
        file = file_from(damaged)
    except InputError:
        return
    assert len(damaged) == 8 + struct.unpack("<Q", damaged[:8])[0] + sum(t.nbytes for t in file.tensors.values())


# -- JSON and names ------------------------------------------------------------------------------------------------


@examples(200)
@given(json_values)
def test_strict_json_reads_what_json_writes(value):
    assert parse_json(json.dumps(value).encode(), what="x") == value
    assert parse_json(canonical_json(value), what="x") == value


@pytest.mark.slow
@examples(200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_strict_json_raises_nothing_but_input_errors(data):
    try:
        canonical_json(parse_json(data, what="x"))
    except InputError as error:
        assert error.message.isprintable()


@examples(200)
@given(st.text(st.characters(), max_size=30))
def test_escaped_text_is_printable_and_stays_as_it_is(value):
    assert escape(value).isprintable() and escape(escape(value)) == escape(value)
    escape(value).encode("utf-8")


@examples(200)
@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()))
def test_standard_input_is_a_path_or_an_input_error(data):
    try:
        assert model_from_stdin(data)
    except InputError as error:
        assert error.hint


# -- parameters ----------------------------------------------------------------------------------------------------


@examples(200)
@given(
    st.integers(0, 10**12), st.sampled_from(["", "k", "M", "g", "T"]), st.booleans(), st.sampled_from(["", "B", "b"])
)
def test_sizes_are_exact(number, unit, binary, suffix):
    power = "_kmgt".index(unit.lower() or "_")
    size = number * (1024 if binary else 1000) ** power
    spelled = f"{number}{unit}{'i' * binary}{suffix}"
    if size >= 2**63:
        with pytest.raises(UsageError):
            parse_size(spelled, flag="--x")
    else:
        assert abs(parse_size(spelled, flag="--x") - size) <= size // 2**52


@examples(300)
@given(st.text(max_size=12) | st.from_regex(r"[\d.]{0,8}\s?[KMGTP]?i?B?", fullmatch=True))
def test_words_for_sizes_layers_and_parts_raise_nothing_but_usage_errors(word):
    for parse in (lambda: parse_size(word, flag="--x"), lambda: parse_layers(word, layers=5), lambda: parse_part(word)):
        with contextlib.suppress(UsageError):
            assert parse() is not None


@examples(200)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5))
def test_layers_are_the_union_of_the_ranges(ranges):
    spelled = ",".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges)
    wanted = sorted({n for a, b in ranges for n in range(a, b + 1)})
    if any(a > b or b >= 20 for a, b in ranges):
        with pytest.raises(UsageError):
            parse_layers(spelled, layers=20)
    else:
        assert list(parse_layers(spelled, layers=20)) == wanted


# -- plans ---------------------------------------------------------------------------------------------------------


@examples(200)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=1, max_size=30), st.integers(1, 200))
def test_shards_hold_every_tensor_once_in_order_and_respect_their_size(groups, size):
    items = [
        Item(tuple(TensorSpec(f"{i}.{j}", "U8", (n,), "r.x", n) for j, n in enumerate(group)))
        for i, group in enumerate(groups)
    ]
    shards = pack_shards(items, shard_size=size)
    assert [i for s in shards for i in s.items] == items
    for shard in shards:
        assert shard.items and (len(shard.items) == 1 or sum(i.nbytes for i in shard.items) <= size)
    for a, b in itertools.pairwise(shards):  # no shard could have taken the next item too
        assert sum(i.nbytes for i in a.items) + b.items[0].nbytes > size
    expected = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    assert [s.name for s in shards] == expected
    for shard in shards:
        header, infos = serialise_header((s.name, s.dtype, s.shape) for s in shard.layout())
        assert shard.nbytes == max((i.end for i in infos.values()), default=len(header))


@examples(200)
@given(st.lists(st.integers(0, 9), max_size=12))
def test_picked_rows_are_those_asked_for(chosen):
    from moeconv.checkpoint.safetensors_file import TensorRef

    ref = TensorRef("w", "BF16", (10, 3), "s", 0, 60)
    data = bytes(range(60))
    picked = b"".join(data[n.start : n.start + n.nbytes] for n in pick_rows(ref, chosen))
    assert picked == b"".join(data[6 * r : 6 * r + 6] for r in chosen)


@pytest.mark.slow
@examples(60)
@given(
    st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64"]), st.integers(0, 3000)), min_size=1, max_size=12),
    st.randoms(use_true_random=False), st.integers(1, 9000), st.booleans(),
)  # fmt: skip
def test_a_file_written_in_any_pieces_and_order(tensors, rng, piece, in_order):
    """With buffers of two blocks, so that small files cross many of their edges."""
    layout = [(f"t{i}", dtype, (n,)) for i, (dtype, n) in enumerate(tensors)]
    data = {name: rng.randbytes(tensor_nbytes(d, s)) for name, d, s in layout}
    pieces = [(n, at, raw[at : at + piece]) for n, raw in data.items() for at in range(0, len(raw), piece)]
    if not in_order:
        rng.shuffle(pieces)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(blocks, "BUFFER", 2 * blocks.ALIGN)
        path = Path(folder) / "f"
        writer = ShardWriter(path, layout)
        for name, at, raw in pieces:
            writer.write(name, raw, start=at)
        sha256, size = writer.finish()
        written = path.read_bytes()
        assert (sha256, size) == (hashlib.sha256(written).hexdigest(), len(written))
        assert {n: raw for n, (_, _, raw) in read_file(path).items()} == data


# -- whole runs ----------------------------------------------------------------------------------------------------

sizes = st.sampled_from(["1", "3KB", "10KB", "31KB", "1GB"])
jobs = st.integers(1, 5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {f"dense {f}": make_dense(folder / f, f, shards=2) for f in ("llama", "qwen2", "qwen3")}
    made |= {f"moe {f}": make_moe(folder / f, f, shards=3, experts=5) for f in ("mixtral", "qwen2_moe", "olmoe")}
    return {name: open_model(path) for name, path in made.items()}


def bytes_of(plan, model, **how) -> tuple[dict, str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        execute(plan, source=model.checkpoint, out=out, **how)
        report = verify(str(out), source=str(model.checkpoint.path))
        assert report["ok"], report["problems"]
        return read_tensors(out), (out / "config.json").read_text()


@pytest.mark.slow
@examples(12)
@given(
    st.sampled_from(["llama", "qwen2", "qwen3"]), st.sampled_from(["copy", "noise", "drop"]), st.integers(1, 4),
    st.sampled_from([None, "float32"]), st.integers(0, 3), sizes, jobs,
)  # fmt: skip
def test_upcycled_bytes_do_not_depend_on_shards_or_workers(models, family, method, experts, dtype, seed, size, workers):
    model = models[f"dense {family}"]
    asked = {"method": method, "experts": experts, "top_k": 1, "dtype": dtype, "seed": seed}
    expected = bytes_of(plan_upcycle(model, **asked), model, jobs=1)
    assert bytes_of(plan_upcycle(model, shard_size=size, **asked), model, jobs=workers) == expected


@pytest.mark.slow
@examples(12)
@given(
    st.sampled_from(["mixtral", "qwen2_moe", "olmoe"]),
    st.lists(st.sets(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=2),
    st.sampled_from([None, "float32"]), sizes, jobs,
)  # fmt: skip
def test_pruned_bytes_do_not_depend_on_shards_or_workers(models, family, keep, dtype, size, workers):
    model = models[f"moe {family}"]
    asked = {"keep": 3, "keep_experts": dict(enumerate(map(sorted, keep))), "dtype": dtype}
    expected = bytes_of(plan_prune(model, **asked), model, jobs=1)
    assert bytes_of(plan_prune(model, shard_size=size, **asked), model, jobs=workers) == expected


# -- hostile checkpoints ---------------------------------------------------------------------------------------------

junk = json_values | st.sampled_from(
    [None, True, -1, 0, 1, 2**70, 0.5, "", "x", [], [None], [[1]], {}, {"a": {}}, [0, 1], "\x1b[2J"]
)


def use(path: Path) -> None:
    """Everything that looks and plans."""
    model = open_model(path)
    json.dumps(inspect(model))
    verify(str(path), source=str(path))
    for plan in (
        lambda: plan_upcycle(model, experts=2),
        lambda: plan_upcycle(model, to="qwen2_moe", method="drop", dtype="float32"),
        lambda: plan_prune(model, keep=3), lambda: plan_quantize(model, group_size="32"),
        lambda: plan_quantize(model, format="bitsandbytes"),
    ):  # fmt: skip
        try:
            parse_json(b"".join(plan().canonical()), what="plan")
        except MoeconvError as error:
            assert error.exit_code in (2, 3) and error.message


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victims")
    extra = {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "rope_parameters": {"rope_theta": 1.0},
    }
    return [
        make_dense(folder / "llama", "llama", shards=2, head_dim=8),
        make_dense(folder / "qwen2", "qwen2", **extra),
        make_moe(folder / "qwen3_moe", "qwen3_moe"),
        make_moe(folder / "mixtral", shards=2, quantization_config={"quant_method": "x", "config_groups": {"a": {}}}),
    ]  # fmt: skip


def replaced(rng: random.Random, value, new: list):
    """`value` with one to three of its leaves, at any depth, replaced."""
    value = json.loads(json.dumps(value))
    for junk_value in new:
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.5:
                at = at[key]
            else:
                at[key] = json.loads(json.dumps(junk_value))
                break
    return value


@pytest.mark.slow
@examples(150)
@given(st.integers(0, 3), st.lists(junk, min_size=1, max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_a_config_with_wrong_values_is_an_input_error_or_harmless(victims, which, new, rng, missing):
    path = victims[which] / "config.json"
    before = path.read_text()
    config = replaced(rng, json.loads(before), new)
    if missing:
        config.pop(rng.choice(list(config)))
    try:
        path.write_text(json.dumps(config))
        use(path.parent)
    except InputError as error:
        assert error.message.isprintable() and len(error.message) < 2000
    finally:
        path.write_text(before)


@examples(60)
@given(st.lists(junk, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_an_index_with_wrong_values_is_an_input_error(victims, new, rng):
    path = victims[0] / INDEX_NAME
    before = path.read_text()
    try:
        path.write_text(json.dumps(replaced(rng, json.loads(before), new)))
        Checkpoint(path.parent)
    except InputError as error:
        assert error.message.isprintable()
    finally:
        path.write_text(before)


@pytest.mark.slow
@examples(60)
@given(st.lists(junk, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_manifest_with_wrong_values_is_a_problem_and_no_more(models, tmp_path_factory, new, rng):
    out = tmp_path_factory.getbasetemp() / "with-manifest"
    if not out.exists():
        model = models["dense llama"]
        execute(plan_upcycle(model, experts=3, top_k=1), source=model.checkpoint, out=out)
    path = out / "moeconv_manifest.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(replaced(rng, json.loads(before), new)))
        use(out)
        moe = open_model(out)
        with tempfile.TemporaryDirectory() as folder:
            execute(plan_prune(moe, keep=2), source=moe.checkpoint, out=Path(folder) / "out")
    except InputError as error:
        assert error.message.isprintable()
    finally:
        path.write_text(before)


@examples(30)
@given(st.integers(0, 10**9))
def test_the_identity_of_a_small_checkpoint_sees_every_byte(victims, at):
    path = victims[1] / "model.safetensors"
    identity = open_model(path.parent).identity
    before = path.read_bytes()
    infos = SafetensorsFile(path).tensors.values()
    base = min(i.start for i in infos)
    at = base + at % (len(before) - base)
    assert len(before) < 16 * 4096
    try:
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert open_model(path.parent).identity != identity
    finally:
        path.write_bytes(before)
