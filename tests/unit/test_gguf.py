"""--format gguf: a file that the gguf package reads back, Q4_K as good as its search, and refusals before any work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import MOE, edit_json, make_dense, make_moe, read_tensors

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.pack import ggml
from moeconv.plan.meter import SilentMeter
from moeconv.quantize.gguf.pre_tokenizers import BYTES, DIGITS, GPT2, LLAMA3, NAMES
from moeconv.quantize.planner import plan_quantize

gguf = pytest.importorskip("gguf")
# llama.cpp renormalises in these families as the config must say
NORM = {
    "mixtral": {}, "qwen2_moe": {"norm_topk_prob": False}, "qwen3_moe": {},
    "olmoe": {"norm_topk_prob": False, "kv_heads": 4},
}  # fmt: skip


def tokenizer(path, *, size=64, **changes):
    """A byte-level BPE of single letters, as many as the model has rows."""
    words = {chr(33 + i): i for i in range(size - 2)} | {"ab": size - 2}
    value = {
        "version": "1.0", "added_tokens": [{"id": 1, "content": '"', "special": True}], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "byte_fallback": False, "vocab": words, "merges": [["a", "b"]]},
    } | changes  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(value))
    return path


def make(path, family="mixtral", **keywords):
    keywords = {"hidden": 64, "intermediate": 512, **NORM[family], **keywords}
    return tokenizer(make_moe(path, family, **keywords))


def write(path, out, **parameters):
    model = open_model(path)
    plan = plan_quantize(model, format="gguf", **parameters)
    execute(plan, source=model.checkpoint, out=out)
    return model, plan, gguf.GGUFReader(out / "model.gguf")


def floats(tensor):
    """A tensor of the file as float32, row-major."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def source_floats(path, name):
    from tiny import decode

    dtype, shape, data = read_tensors(path)[name]
    return decode(data, dtype, shape)


@pytest.mark.parametrize("scheme", ["q4_k", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", sorted(MOE))
def test_the_file_holds_the_model(tmp_path, family, scheme):
    path = make(tmp_path / "m", family, layers=2)
    model, plan, reader = write(path, tmp_path / "out", scheme=scheme)
    assert (tmp_path / "out" / "model.gguf").stat().st_size == plan.nbytes
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.gguf", "moeconv_manifest.json"]
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == plan.tensors
    assert plan.changed == plan.promise == {"expert": 2 * 4 * 3}
    down = np.stack([source_floats(path, model.expert_name("down", layer=1, expert=e)) for e in range(4)])
    found = floats(tensors["blk.1.ffn_down_exps.weight"])
    limit = {"q4_k": 0.09, "q8_0": 0.01, "q4_0": 0.11}[scheme]
    assert found.shape == down.shape and np.sqrt(((found - down) ** 2).mean() / (down**2).mean()) < limit
    for name in ("output_norm.weight", "blk.0.ffn_gate_inp.weight"):
        assert tensors[name].tensor_type.name == "F32"
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == "BF16"
    keys = {key.split(".", 1)[-1]: field for key, field in reader.fields.items()}
    assert keys["expert_count"].contents() == 4 and keys["expert_used_count"].contents() == 2
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 64 and tokens[62] == "ab" and tokens[63] == "[PAD63]"
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["a b"]


def test_the_same_bytes_for_any_number_of_workers_and_streamed(tmp_path):
    path = make(tmp_path / "m", shards=3)
    model = open_model(path)
    plan = plan_quantize(model, format="gguf")
    for jobs in (1, 4):
        execute(plan, source=model.checkpoint, out=tmp_path / str(jobs), jobs=jobs)
    assert (tmp_path / "1/model.gguf").read_bytes() == (tmp_path / "4/model.gguf").read_bytes()
    # an item is one expert's matrix, though the file's tensor is all of a layer's
    assert plan.largest_item < 2 * 512 * 64 * 4


def test_rotary_rows_of_llama_are_interleaved(tmp_path):
    path = make(tmp_path / "m", "mixtral")
    _, _, reader = write(path, tmp_path / "out")
    tensors = {t.name: t for t in reader.tensors}
    q = source_floats(path, "model.layers.0.self_attn.q_proj.weight")
    rows = [h * 16 + i + half * 8 for h in range(4) for i in range(8) for half in (0, 1)]
    raw = tensors["blk.0.attn_q.weight"].data.view(np.uint16).astype(np.uint32) << 16
    assert np.array_equal(raw.view(np.float32).reshape(64, 64), q[rows])


def test_widths_that_256_does_not_divide_fall_back_and_say_so(tmp_path):
    path = make(tmp_path / "m")  # gate and up have 64 columns, down 512
    _, plan, reader = write(path, tmp_path / "out", scheme="q4_k")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_K" and kinds["blk.0.ffn_gate_exps.weight"] == "Q5_0"
    assert any("stored as Q5_0" in w and "ffn_gate_exps" in w for w in plan.warnings)


def encoded(weight: np.ndarray, dtype: str) -> np.ndarray:
    data = ggml.encode(torch.from_numpy(weight), dtype)
    assert len(data) == tensor_nbytes(dtype, weight.shape)
    return ggml.decode(data, dtype, weight.shape)


def of_21_tries(x: np.ndarray) -> np.ndarray:
    """[n, 256] as ggml's make_qkx2_quants, without its weighting, gives it back: of 21 scales of a block the one whose
    least squares err least, rounded to 6 bits. The yardstick of our search."""
    x = x.astype(np.float64).reshape(-1, 8, 32)
    low = np.minimum(x.min(-1), 0)
    least, scale, offset = np.full(low.shape, np.inf), np.zeros(low.shape), np.zeros(low.shape)
    for i in range(21):
        q = np.rint((x - low[..., None]) / (x.max(-1) - low)[..., None] * (14 + 0.1 * i)).clip(0, 15)
        sums = q.sum(-1), (q * q).sum(-1), (q * x).sum(-1), x.sum(-1)
        det = 32 * sums[1] - sums[0] ** 2
        s, o = (32 * sums[2] - sums[0] * sums[3]) / det, (sums[0] * sums[2] - sums[1] * sums[3]) / det
        s, o = np.where(o < 0, sums[2] / sums[1], s), np.maximum(o, 0)
        error = ((s[..., None] * q - o[..., None] - x) ** 2).sum(-1)
        scale, offset = np.where(error < least, s, scale), np.where(error < least, o, offset)
        least = np.minimum(error, least)
    d, dmin = ((part.max(-1, keepdims=True) / 63).astype(np.float16).astype(float) for part in (scale, offset))
    step, low = d * np.rint(scale / d).clip(0, 63), dmin * np.rint(offset / dmin).clip(0, 63)
    return (np.rint((x + low[..., None]) / step[..., None]).clip(0, 15) * step[..., None] - low[..., None]).reshape(
        -1, 256
    )


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("draw", ["normal", "laplace", "student"])
def test_q4_k_errs_no_more_than_a_search_of_21_scales(draw, scale):
    rng = np.random.default_rng(0)
    weight = {"normal": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n),
              "student": lambda n: rng.standard_t(4, n)}[draw]((512, 1024))  # fmt: skip
    weight = (weight * scale).astype(np.float32)
    known = of_21_tries(weight.reshape(-1, 256)).reshape(weight.shape)
    found, known = (float((w - weight).std() / weight.std()) for w in (encoded(weight, "Q4_K"), known))
    assert found <= known
    if draw == "normal":
        assert found < 0.073  # FORMATS: Gaussian weights .078, searched .073


def test_q4_k_of_constant_and_one_sided_blocks():
    for value in (0.0, 3.0, -3.0):
        weight = np.full((2, 256), value, np.float32)
        assert np.allclose(encoded(weight, "Q4_K"), weight, rtol=1e-3)
    weight = np.abs(np.random.default_rng(1).standard_normal((4, 256))).astype(np.float32) + 5
    for one_sided in (weight, -weight):
        assert np.abs(encoded(one_sided, "Q4_K") - one_sided).max() < 0.5
    mixed = weight.copy()
    mixed[0, :64], mixed[1, 32:96], mixed[2, 5] = 0, -2.5, -40
    assert np.abs(encoded(mixed, "Q4_K") - mixed).max() < 2
    for bad in (np.nan, np.inf, 1e9):
        weight[1, 7] = bad
        with pytest.raises(InputError):
            encoded(weight, "Q4_K")


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
def test_plain_blocks_are_the_gguf_packages_bytes(dtype):
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    weight[:8] = rng.integers(-254, 255, (8, 256)) / np.float32(2)  # halves, which round away from zero
    weight[:8, ::32] = 127
    weight[8], weight[9, :32] = 0, 1e-30
    weight[10:12] *= 1e4
    expected = quantize(weight, GGMLQuantizationType[dtype]).tobytes()
    assert bytes(ggml.encode(torch.from_numpy(weight), dtype)) == expected
    weight[3, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        ggml.encode(torch.from_numpy(weight), dtype)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("olmoe", {"kv_heads": 2}, "fewer heads"),
        ("mixtral", {"sliding_window": 16}, "sliding-window"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("mixtral", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "type dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, family, config, says):
    path = make(tmp_path / "m", family, **config)
    with pytest.raises(InputError, match=says):
        plan_quantize(open_model(path), format="gguf")


def test_tokenizers_that_are_not_known_are_refused(tmp_path):
    path = make(tmp_path / "m")
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    for changes in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFKC"}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}},
        {"model": {"type": "BPE"}},
        {"added_tokens": [{"id": 9999, "content": "x", "special": True}]},
    ):
        tokenizer(path, **changes)
        with pytest.raises(InputError):
            plan_quantize(open_model(path), format="gguf")
    (path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        plan_quantize(open_model(path), format="gguf")


def pre_tokenizer(steps):
    """The pre_tokenizer of tokenizer.json with these steps."""

    def step(word):
        if word in (BYTES, GPT2):
            return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": word == GPT2}
        if word == DIGITS:
            return {"type": "Digits", "individual_digits": True}
        return {"type": "Split", "pattern": {"Regex": word}, "behavior": "Isolated", "invert": False}

    return {"type": "Sequence", "pretokenizers": [step(word) for word in steps]}


def name_of(path, steps, **model):
    """llama.cpp's name for a tokenizer with these steps. Its token "ab" is made by a merge, and "cd" by none."""
    words = {chr(33 + i): i for i in range(62)} | {"ab": 62, **model.pop("more", {"cd": 63})}
    model = {"type": "BPE", "vocab": words, "merges": [["a", "b"]], **model}
    tokenizer(path, pre_tokenizer=pre_tokenizer(steps), model=model, added_tokens=[])
    data = plan_quantize(open_model(path), format="gguf").shards[0].gguf.metadata
    key = b"tokenizer.ggml.pre"
    start = data.index(key) + len(key) + 4
    return data[start + 8 : start + 8 + int.from_bytes(data[start : start + 8], "little")].decode()


def test_every_known_way_to_split_has_its_name(tmp_path):
    path = make(tmp_path / "m")
    for steps, names in NAMES.items():
        for name, whole in names[:1]:
            assert name_of(path, steps, ignore_merges=whole) == name


def test_whether_whole_words_are_merged_matters_where_a_token_is_made_by_no_merge(tmp_path):
    path = make(tmp_path / "m")
    qwen2 = next(steps for steps, names in NAMES.items() if names[0][0] == "qwen2")
    with pytest.raises(InputError, match="split texts"):
        name_of(path, qwen2, ignore_merges=True)
    assert name_of(path, qwen2, ignore_merges=True, more={}) == "qwen2"
    assert name_of(path, (LLAMA3, BYTES), ignore_merges=False) == "smaug-bpe"
    assert name_of(path, (LLAMA3, BYTES), ignore_merges=False, more={}) == "glm4"


def sentencepiece(path, **changes):
    """A BPE with byte fallback, as SentencePiece models become in a tokenizer.json."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    pieces.append("\u2581ab")
    model = {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": ["\u2581 a", ["a", "b"], "\u2581a b", "\u2581 ab"],
    } | changes.pop("model", {})  # fmt: skip
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    special = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    value = {
        "version": "1.0", "added_tokens": [*special, {"id": 265, "content": "<call>", "special": False}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, visible]},
        "pre_tokenizer": None, "model": model,
    } | changes  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(value))
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    return path


def test_a_sentencepiece_tokenizer_becomes_scores_and_types(tmp_path):
    path = sentencepiece(make_moe(tmp_path / "m", "mixtral", hidden=64, intermediate=512, vocab=300))
    _, plan, reader = write(path, tmp_path / "out")

    def value(key):
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    tokens, types, scores = value("tokens"), value("token_type"), value("scores")
    assert (value("model"), value("add_space_prefix"), value("add_bos_token")) == ("llama", True, True)
    assert not any("space in front" in text for text in plan.warnings)
    assert len(tokens) == len(types) == len(scores) == 300
    assert types[:3] == [2, 3, 3] and set(types[3:259]) == {6} and set(types[259:265]) == {1}
    assert (types[265], types[266]) == (4, 5)
    found = {token: score for token, score in zip(tokens, scores) if token in ("\u2581a", "ab", "\u2581ab")}
    assert found == {"\u2581a": 0.0, "ab": -1.0, "\u2581ab": -2.0}  # the order of the merges that make them
    assert "tokenizer.ggml.merges" not in reader.fields


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"merges": ["a b", "\u2581 a", "\u2581a b"]}},  # another way to make the last token is no merge
        {"model": {"merges": ["\u2581a b", "\u2581 a", "a b", "\u2581 ab"]}},  # one token in two places of the order
        {"model": {"merges": ["\u2581 a", "\u2581a b", "\u2581 ab"]}},  # "ab" would be joined all the same
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": True}},
    ],
)
def test_a_sentencepiece_tokenizer_that_scores_cannot_say_is_refused(tmp_path, changes):
    path = make_moe(tmp_path / "m", "mixtral", hidden=64, intermediate=512, vocab=300)
    sentencepiece(path, **changes)
    with pytest.raises(InputError, match="split texts"):
        plan_quantize(open_model(path), format="gguf")


@pytest.mark.parametrize(("scheme", "front"), [("first", True), ("always", True), ("never", False)])
def test_the_space_in_front_is_said_by_either_wording(tmp_path, scheme, front):
    path = make_moe(tmp_path / "m", "mixtral", hidden=64, intermediate=512, vocab=300)
    pre = {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": scheme}
    sentencepiece(path, normalizer=None, pre_tokenizer=pre)
    _, plan, reader = write(path, tmp_path / "out")
    assert reader.fields["tokenizer.ggml.add_space_prefix"].contents() is front
    assert any("puts a space in front of every text" in text for text in plan.warnings) is front


def test_what_the_model_is_and_how_it_is_sampled_stands_in_the_file(tmp_path):
    path = make(tmp_path / "Tiny-MoE")
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "min_p": None}
    (path / "generation_config.json").write_text(json.dumps(settings))
    card = "---\nlicense: apache-2.0\nbase_model: some-org/Base-8B-v2\ntags: [moe]\nlanguage: en\n---\n# Tiny\n"
    (path / "README.md").write_text(card)
    _, _, reader = write(path, tmp_path / "out")
    found = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    sampling = {key.removeprefix("general.sampling."): v for key, v in found.items() if ".sampling." in key}
    assert sampling == {"temp": pytest.approx(0.6), "top_k": 20, "top_p": pytest.approx(0.95)}
    assert (found["general.name"], found["general.type"]) == ("Tiny MoE", "model")
    assert found["general.base_model.count"] == 1 and found["general.base_model.0.organization"] == "Some Org"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/some-org/Base-8B-v2"
    assert (found["general.tags"], found["general.languages"]) == (["moe"], ["en"])
    assert found["general.license"] == "apache-2.0" and found["general.size_label"].startswith("4x")


def test_prediction_layers_are_left_out_by_name(tmp_path):
    from unit.test_mtp import make as make_predicting

    path = tokenizer(make_predicting(tmp_path / "m", "glm4_moe", n_group=1, topk_group=1)[0], size=128)
    model, plan, reader = write(path, tmp_path / "out", scheme="q8_0")
    ahead = [name for name, role in model.roles.items() if role.layer in model.mtp_layers]
    assert ahead and set(ahead) <= set(plan.dropped)
    assert any("multi-token-prediction layers" in text and "llama.cpp does not run" in text for text in plan.warnings)
    layers = {int(t.name.split(".")[1]) for t in reader.tensors if t.name.startswith("blk.")}
    assert layers == set(range(model.num_layers))
    assert reader.fields["glm4moe.block_count"].contents() == model.num_layers
    assert plan.changed["expert"] == len(model.moe_layers) * model.num_experts * 3


def test_other_refusals(tmp_path):
    with pytest.raises(InputError, match="has 72 columns, but GGUF needs a multiple of 32"):
        plan_quantize(open_model(make(tmp_path / "odd", hidden=72)), format="gguf")
    path = make(tmp_path / "m")
    with pytest.raises(UsageError, match="no scheme int4"):
        plan_quantize(open_model(path), format="gguf", scheme="int4")
    write(path, tmp_path / "out")
    with pytest.raises(InputError, match="GGUF weights"):
        Checkpoint(tmp_path / "out")
    edit_json(path / "config.json", architectures=["X"], model_type="phimoe")
    with pytest.raises(InputError):
        plan_quantize(open_model(path), format="gguf")


def test_a_run_that_was_cut_off_leaves_nothing_and_gives_the_same_bytes_again(tmp_path):
    class CutOff(SilentMeter):
        left = 40

        def advance(self, nbytes):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    model = open_model(make(tmp_path / "m"))
    plan = plan_quantize(model, format="gguf")
    with pytest.raises(KeyboardInterrupt):
        execute(plan, source=model.checkpoint, out=tmp_path / "out", meter=CutOff())
    assert not (tmp_path / "out").exists()
    for out in ("out", "other"):
        execute(plan, source=model.checkpoint, out=tmp_path / out)
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "other/model.gguf").read_bytes()


def test_a_recipe_may_end_in_gguf(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer(make_dense(tmp_path / "dense", hidden=64, intermediate=512))
    steps = [
        {"step": "upcycle", "from": "dense", "to": "moe", "with": {"experts": 4, "no_check": True}},
        {"step": "quantize", "from": "moe", "to": "out", "with": {"format": "gguf"}},
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps}))
    planned = cli("run", tmp_path / "recipe.yaml", "--dry-run", "--json").json
    done = cli("run", tmp_path / "recipe.yaml", "--json").json
    size = (tmp_path / "out/model.gguf").stat().st_size
    assert planned["steps"][-1]["bytes"] == done["steps"][-1]["bytes"] == size
    assert done["steps"][-1]["result"]["quantize"]["counted"] == {"expert": 2 * 4 * 3}
    assert (tmp_path / "out/README.md").read_text().count("model.gguf")


def test_a_model_beyond_the_size_becomes_several_files(tmp_path, cli):
    path = make(tmp_path / "m", "qwen3_moe", layers=3)
    whole, _ = write(path, tmp_path / "whole", scheme="q8_0")[1:]
    words = ("--format", "gguf", "--scheme", "q8_0", "--split-size", "150KB")
    planned = cli("quantize", path, tmp_path / "out", *words, "--dry-run", "--json").json
    done = cli("quantize", path, tmp_path / "out", *words, "--json").json
    names = sorted(p.name for p in (tmp_path / "out").glob("*.gguf"))
    count = len(names)
    assert count > 2 and names == [f"model-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert planned["bytes"] == done["bytes"] == sum((tmp_path / "out" / n).stat().st_size for n in names)
    assert done["quantize"]["counted"] == {"expert": 3 * 4 * 3} and done["tensors"] == whole.tensors
    readers = [gguf.GGUFReader(tmp_path / "out" / name) for name in names]
    for no, reader in enumerate(readers):
        about = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        assert about == {"split.no": no, "split.count": count, "split.tensors.count": whole.tensors}
        assert reader.fields["split.no"].types == [gguf.GGUFValueType.UINT16]
        assert ("general.architecture" in reader.fields) is (no == 0)
    one = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "whole" / "model.gguf").tensors}
    several = {t.name: t.data for reader in readers for t in reader.tensors}
    assert one.keys() == several.keys() and all(np.array_equal(one[name], several[name]) for name in one)
    assert cli("verify", tmp_path / "out").code == 0
    assert cli("quantize", path, tmp_path / "no", *words[:-1], "0GB").code == 2


@pytest.mark.parametrize("scheme", ["f32", "f16", "q4_k_m", "q2_k"])
def test_a_whole_file_has_every_matrix_in_a_type_of_its_recipe(tmp_path, cli, scheme):
    path = make(tmp_path / "m", "mixtral", hidden=256)  # whose queries are in another order in the file
    done = cli("quantize", path, tmp_path / "out", "--format", "gguf", "--scheme", scheme, "--scope", "all", "--json")
    assert done.code == 0, done.out
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    floats_of = {"f32": "F32", "f16": "F16"}
    if scheme in floats_of:
        expected = dict.fromkeys(("blk.0.attn_q.weight", "output.weight", "token_embd.weight"), floats_of[scheme])
    elif scheme == "q4_k_m":
        expected = {"output.weight": "Q6_K", "token_embd.weight": "Q4_K", "blk.1.ffn_down_exps.weight": "Q6_K"}
    else:
        expected = {"output.weight": "Q6_K", "token_embd.weight": "Q2_K", "blk.0.attn_output.weight": "Q3_K"}
    assert expected.items() <= kinds.items()
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    assert done.json["quantize"]["scope"] == "all"


def test_a_recipe_does_not_leave_tensors_out(tmp_path):
    model = open_model(make(tmp_path / "m"))
    with pytest.raises(UsageError, match="q4_k_m decides the type of every tensor"):
        plan_quantize(model, format="gguf", scheme="q4_k_m", scope="experts")
    with pytest.raises(UsageError, match="does not support --scope all"):
        plan_quantize(model, scope="all")


def test_a_modelfile_has_the_sampling_settings_and_the_stop_words(tmp_path, cli):
    source = make(tmp_path / "m", intermediate=64)
    tokens = [{"id": i, "content": word, "special": True} for i, word in ((1, "<|end|>"), (2, 'a"b'), (3, "unused"))]
    tokenizer(source, added_tokens=tokens)
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True,
                "eos_token_id": [1, 2, 60], "stop_strings": "User:"}  # fmt: skip
    (source / "generation_config.json").write_text(json.dumps(settings))
    words = ("--format", "gguf", "--scheme", "q8_0", "--json")
    planned = cli("quantize", source, tmp_path / "out", *words, "--modelfile", "--dry-run").json
    done = cli("quantize", source, tmp_path / "out", *words, "--modelfile")
    assert done.code == 0 and done.json["plan_id"] == planned["plan_id"], done.out
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines() == [
        "FROM ./model.gguf", "PARAMETER temperature 0.7", "PARAMETER top_k 20", "PARAMETER top_p 0.8",
        "PARAMETER repeat_penalty 1.05", 'PARAMETER stop "<|end|>"', 'PARAMETER stop """a"b"""',
        'PARAMETER stop "User:"',
    ]  # fmt: skip
    assert "Modelfile" in done.json["files"] and cli("verify", tmp_path / "out", "--json").json["ok"] is True
    plain = cli("quantize", source, tmp_path / "plain", *words)
    assert plain.code == 0 and not (tmp_path / "plain" / "Modelfile").exists()
    assert (tmp_path / "plain" / "model.gguf").read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()
    assert "modelfile" not in (tmp_path / "plain" / "moeconv_manifest.json").read_text()
    (source / "generation_config.json").unlink()  # the token that the config names then ends an answer
    assert cli("quantize", source, tmp_path / "out", *words, "--modelfile", "--overwrite").code == 0
    assert json.loads((source / "config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model.gguf\nPARAMETER stop """a"b"""\n'


def test_a_modelfile_is_refused_where_ollama_cannot_use_it(tmp_path, cli):
    source = make(tmp_path / "m", intermediate=64)
    split = ("--format", "gguf", "--scheme", "q8_0", "--split-size", "10KB")
    for words, said in (((), "does not use --modelfile"), (split, "ollama reads one file")):
        done = cli("quantize", source, tmp_path / "out", *words, "--modelfile", "--json")
        assert done.code == 2 and said in done.json["error"]["message"] and not (tmp_path / "out").exists(), done.out


def test_a_file_may_be_named_after_its_type(tmp_path, cli):
    source = make(tmp_path / "m", intermediate=64)
    words = ("--format", "gguf", "--scheme", "q8_0", "--no-check", "--json", "--file-name")
    assert cli("quantize", source, tmp_path / "a", *words, "mine-{type}", "--modelfile").code == 0
    assert (tmp_path / "a" / "Modelfile").read_text().startswith("FROM ./mine-Q8_0.gguf\n")
    assert "PATH/mine-Q8_0.gguf" in (tmp_path / "a" / "README.md").read_text()
    assert cli("verify", tmp_path / "a", "--json").json["ok"] is True
    done = cli("quantize", source, tmp_path / "b", *words, "x.gguf", "--split-size", "100KB")
    assert done.code == 0 and sorted(path.name for path in (tmp_path / "b").glob("*.gguf"))[0].startswith("x-00001-of-")
    for name in ("a/b", "", ".hidden", "x-00001-of-00002", "{scheme}"):
        done = cli("quantize", source, tmp_path / "c", *words, name)
        assert done.code == 2 and "--file-name" in done.json["error"]["message"] and not (tmp_path / "c").exists()
    assert cli("quantize", source, tmp_path / "c", "--file-name", "x", "--no-check").code == 2  # of another format
