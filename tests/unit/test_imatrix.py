"""Importance matrices: measured layer by layer as hooks on the whole model see the inputs, and used by the encoders."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from tiny import make_moe
from unit.test_gguf import floats, source_floats, tokenizer
from words import text

from moeconv.checkpoint.imatrix import Entry, Imatrix
from moeconv.errors import InputError, UsageError
from moeconv.families.model import open_model
from moeconv.quantize.planner import plan_quantize

gguf = pytest.importorskip("gguf")


def entries(path):
    reader = gguf.GGUFReader(path)
    found = {t.name: np.array(t.data).reshape([int(n) for n in reversed(t.shape)]) for t in reader.tensors}
    return found, {key: field.contents() for key, field in reader.fields.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model of 8 experts of which four are never chosen, and its importance matrix."""
    from moeconv.options import DataOptions, MeasureOptions
    from moeconv.plan.meter import SilentMeter
    from moeconv.quantize.gguf.measure_imatrix import write_imatrix

    folder = tmp_path_factory.mktemp("imatrix")
    path = make_moe(folder / "moe", "qwen3_moe", hidden=256, intermediate=256, experts=8, vocab=300)
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer(path, size=300, pre_tokenizer=split)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1], gate[3] = -gate[0], -gate[2]  # two of these four logits are above 0
            gate[4:] = 0  # and never chosen
    model.save_pretrained(path)
    (folder / "text.txt").write_text(text(600))
    result = write_imatrix(
        str(path), folder / "im.gguf", data=DataOptions(data=(str(folder / "text.txt"),)),
        measure=MeasureOptions(tokens=256, seq_len=32), seed=0, overwrite=False, meter=SilentMeter(),
    )  # fmt: skip
    return folder, result


def test_sums_are_those_of_the_inputs_of_the_stock_model(measured):
    folder, _ = measured
    from transformers import AutoModelForCausalLM

    from moeconv.data.windows import load_tokens

    found, fields = entries(folder / "im.gguf")
    assert (fields["general.type"], fields["imatrix.chunk_size"]) == ("imatrix", 32)
    assert fields["imatrix.chunk_count"] == 8 and fields["imatrix.datasets"] == ["text.txt"]
    read = load_tokens([str(folder / "text.txt")], folder / "moe", tokens=256, seq_len=32, seed=0, text_field="text")
    model = AutoModelForCausalLM.from_pretrained(folder / "moe", dtype=torch.float32, experts_implementation="eager")
    sums, inputs = {}, {}
    hooks = {"q": "self_attn.q_proj", "output": "self_attn.o_proj"}
    for i, layer in enumerate(model.model.layers):
        for part, module in hooks.items():
            layer.get_submodule(module).register_forward_pre_hook(
                lambda _, a, key=f"blk.{i}.attn_{part}.weight": sums.__setitem__(
                    key, a[0].double().square().sum((0, 1))
                )
            )
        layer.mlp.experts.register_forward_pre_hook(lambda _, a, i=i: inputs.__setitem__(i, a))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(read.windows))
        for key, expected in sums.items():
            assert found[f"{key}.in_sum2"].ravel() == pytest.approx(expected.numpy(), rel=1e-4)
            assert found[f"{key}.counts"].ravel().tolist() == [256]
        for i, (x, index, _) in inputs.items():
            experts = model.model.layers[i].mlp.experts
            for e in range(8):
                rows = x[(index == e).any(-1)].double()
                count = len(rows)
                got = {part: found[f"blk.{i}.ffn_{part}_exps.weight.in_sum2"][e] for part in ("gate", "up", "down")}
                assert found[f"blk.{i}.ffn_gate_exps.weight.counts"][e, 0] == max(count, 1)
                if not count:
                    continue
                gate, up = (rows @ experts.gate_up_proj[e].double().T).chunk(2, -1)
                made = torch.nn.functional.silu(gate) * up
                for part, values in (("gate", rows), ("up", rows), ("down", made)):
                    assert got[part] == pytest.approx(values.square().sum(0).numpy(), rel=1e-3, abs=1e-9)


def test_an_expert_that_was_never_chosen_is_named_and_has_the_mean(measured):
    folder, result = measured
    found, _ = entries(folder / "im.gguf")
    assert any("layer 0" in text and "(4, 5, 6, 7)" in text for text in result["warnings"])
    sums, counts = (found[f"blk.0.ffn_down_exps.weight.{part}"] for part in ("in_sum2", "counts"))
    assert counts.ravel()[4:].tolist() == [1] * 4 and counts[:4].sum() == 2 * 256
    assert sums[5] == pytest.approx(sums[:4].sum(0) / 512, rel=1e-4)
    # the same file as llama.cpp writes it, where such an expert has no tokens at all
    name = "blk.0.ffn_down_exps.weight"
    entry = Entry(np.where(counts > 1, sums, 0), np.where(counts > 1, counts, 0).ravel())
    theirs = Imatrix("", "", {name: entry})
    assert theirs.unused(name, experts=8) == [4, 5, 6, 7]
    assert theirs.values(name, 5, sums.shape[1]) == pytest.approx(sums[:4].sum(0), rel=1e-4)


def quantized(folder, out, cli, *words):
    done = cli("quantize", folder / "moe", out, "--format", "gguf", *words, "--json")
    assert done.code == 0, done.out
    return {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}, done.json


def test_quantize_takes_it_in_both_layouts(measured, tmp_path, cli):
    folder, _ = measured
    found, _ = entries(folder / "im.gguf")
    with open(tmp_path / "im.dat", "wb") as file:
        names = [name.removesuffix(".counts") for name in found if name.endswith(".counts")]
        file.write(struct.pack("<i", len(names)))
        for name in names:
            means = (found[f"{name}.in_sum2"] / found[f"{name}.counts"] * 8).astype("<f4")
            file.write(
                struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 8, means.size) + means.tobytes()
            )
        file.write(struct.pack("<ii", 8, 0))
    plain, _ = quantized(folder, tmp_path / "plain", cli, "--scheme", "q2_k")
    by_gguf, result = quantized(folder, tmp_path / "gguf", cli, "--scheme", "q2_k", "--imatrix", folder / "im.gguf")
    by_dat, _ = quantized(folder, tmp_path / "dat", cli, "--scheme", "q2_k", "--imatrix", tmp_path / "im.dat")
    model = open_model(folder / "moe")
    for part in ("gate", "down"):
        name = f"blk.1.ffn_{part}_exps.weight"
        assert (by_gguf[name].data == by_dat[name].data).mean() > 0.99
        source = np.stack([source_floats(folder / "moe", model.expert_name(part, layer=1, expert=e)) for e in range(8)])
        weight = found[f"{name}.in_sum2"][:, None] / found[f"{name}.counts"][:, None]
        errors = [float((weight * (floats(t[name]) - source) ** 2).sum()) for t in (plain, by_gguf)]
        assert errors[1] < 0.97 * errors[0], part
    assert result["quantize"]["counted"] == {"expert": 2 * 8 * 3}


def test_a_whole_file_with_changed_tensors(tmp_path, cli):
    """Rows of Mixtral's queries are in another order in the file, and are then encoded with the importance."""
    path = tokenizer(make_moe(tmp_path / "moe", "mixtral", hidden=256, intermediate=256, vocab=128), size=128)
    from moeconv.checkpoint.gguf import GgufHead, Stack, metadata_bytes
    from moeconv.checkpoint.writer import writing_artifact

    strong = np.full((1, 256), 1e-3, "<f4")
    strong[0, ::4] = 100.0
    stacks = [Stack("blk.0.attn_q.weight.in_sum2", "F32", (1, 256), ("a",)),
              Stack("blk.0.attn_q.weight.counts", "F32", (1, 1), ("b",))]  # fmt: skip
    head = GgufHead(*metadata_bytes({"general.type": "imatrix"}), tuple(stacks))
    with writing_artifact(tmp_path / "im.gguf", (), metadata={}, head=head) as writer:
        writer.write("a", strong.tobytes())
        writer.write("b", np.ones(1, "<f4").tobytes())
    words = ("--scheme", "q4_k_m")
    plain, _ = quantized(tmp_path, tmp_path / "plain", cli, *words)
    weighed, result = quantized(tmp_path, tmp_path / "weighed", cli, *words, "--imatrix", tmp_path / "im.gguf")
    assert any("has no importance for blk." in text for text in result["warnings"])
    q = source_floats(path, "model.layers.0.self_attn.q_proj.weight")
    heads = q.reshape(4, 2, -1, 256).swapaxes(1, 2).reshape(256, 256)
    errors = [((floats(t["blk.0.attn_q.weight"]) - heads)[:, ::4] ** 2).sum() for t in (plain, weighed)]
    assert errors[1] < 0.7 * errors[0] and errors[0] < 0.02 * (heads[:, ::4] ** 2).sum()


def test_refusals(measured, tmp_path, cli):
    folder, _ = measured
    model = open_model(folder / "moe")
    with pytest.raises(UsageError, match="does not use --imatrix"):
        plan_quantize(model, imatrix=str(folder / "im.gguf"))
    with pytest.raises(UsageError, match="q2_k_s needs an importance matrix"):
        plan_quantize(model, format="gguf", scheme="q2_k_s")
    (tmp_path / "no").write_bytes(b"not an importance matrix")
    for bad in (tmp_path / "no", tmp_path / "missing"):
        with pytest.raises(InputError, match="not a readable importance matrix"):
            plan_quantize(model, format="gguf", scheme="q2_k", imatrix=str(bad))
    other = tokenizer(make_moe(tmp_path / "other", "qwen3_moe", hidden=256, intermediate=512, vocab=128), size=128)
    with pytest.raises(InputError, match="values, but the model"):
        plan_quantize(open_model(other), format="gguf", scheme="q2_k", imatrix=str(folder / "im.gguf"))
    assert cli("calibrate", folder / "moe").code == 2
    both = cli(
        "calibrate", folder / "moe", tmp_path / "s", "--imatrix", tmp_path / "i.gguf", "--data", folder / "text.txt"
    )
    assert both.code == 2 and not (tmp_path / "s").exists()
