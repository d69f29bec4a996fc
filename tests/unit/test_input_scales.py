"""The scales of inputs that NVFP4 with quantized inputs (W4A4) stores: measured on text, for every expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.families.model import open_model
from moeconv.tensors import decode_weight

pytestmark = pytest.mark.usefixtures("one_thread")
SUFFIX = ".input_global_scale"
MOST = 448 * 6  # the largest scale times the largest code


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny MoE of which some experts see no token, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    path = tiny.make_moe(
        folder / "moe", "qwen3_moe", experts=8, top_k=2, dtype="F32", hidden=64, intermediate=64, layers=2
    )
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if shape == (8, 64):  # the router never chooses the last two experts of layer 1
            rows = tiny.decode(data, dtype, shape).copy()
            rows[6:] = 0 if "layers.1." not in name else -rows[:6].sum(0)
            tensors[name] = (dtype, shape, tiny.encode(rows * 40, dtype))
    tiny.write_shards(path, tensors)
    (folder / "text.txt").write_text(text(96, seed=1))
    return add_tokenizer(path), folder / "text.txt"


def stock_peaks(path: Path, data: Path) -> dict[str, float]:
    """The largest magnitude of what each matrix reads in the class of transformers, computed expert by expert."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(data.read_text(), add_special_tokens=False)["input_ids"]
    found: dict[str, float] = {}
    source = open_model(path)

    def linear(name: str):
        def before(_module, args) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        return before

    def experts(layer: int):
        def before(_module, args, kwargs) -> None:
            hidden, index = (*args, *kwargs.values())[:2]
            for e in range(8):
                x = hidden[(index == e).any(-1)]
                stem = f"model.layers.{layer}.mlp.experts.{e}."
                gate, up = (decode_weight(source, f"{stem}{part}_proj.weight") for part in ("gate", "up"))
                inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
                peaks = {"gate_proj": x, "up_proj": x, "down_proj": inner}
                for part, rows in peaks.items():
                    peak = float(rows.abs().max()) if len(x) else 0.0
                    found[stem + part] = max(found.get(stem + part, 0.0), peak)

        return before

    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(experts(i), with_kwargs=True)
        for part in "qkvo":
            name = f"self_attn.{part}_proj"
            layer.get_submodule(name).register_forward_pre_hook(linear(f"model.layers.{i}.{name}"))
    with torch.no_grad():
        model(torch.tensor(ids).view(-1, 16))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--method", "gptq", "--scope", "all-linear")], ids=["experts", "all"])
def test_scales_are_those_of_the_largest_inputs(cli, case, tmp_path, flags):
    path, data = case
    done = cli("quantize", path, tmp_path / "out", "--scheme", "nvfp4-a4", "--data", data, "--seq-len", 16, "--json",
               *flags)  # fmt: skip
    assert done.code == 0, done.out
    model = open_model(tmp_path / "out")
    scales = {n.removesuffix(SUFFIX): n for n in model.checkpoint.tensors if n.endswith(SUFFIX)}
    assert len(scales) == 2 * 8 * 3 + (8 if flags else 0)
    peaks = stock_peaks(path, data)
    unused = {name for name, peak in peaks.items() if not peak}
    assert unused
    for name, tensor in scales.items():
        peak = peaks[name]
        if not peak:  # no token: the largest of the layer
            layer, part = name.split(".")[2], name.rpartition(".")[2]
            peak = max(p for n, p in peaks.items() if n.split(".")[2] == layer and n.endswith(part))
        found = torch.frombuffer(bytearray(model.checkpoint.read(tensor)), dtype=torch.float32)
        assert float(found) == pytest.approx(MOST / peak, rel=2e-5), name
    assert any("no token was routed to" in w for w in done.json["warnings"])
    group = model.quantization["config_groups"]["group_0"]["input_activations"]
    assert group["dynamic"] == "local" and group["strategy"] == "tensor_group" and group["group_size"] == 16
    plain = cli("quantize", path, tmp_path / "plain", "--scheme", "nvfp4", "--json")
    other = open_model(tmp_path / "plain")
    if not flags:  # the weights are those of the scheme that leaves inputs as they are
        same = [n for n in other.checkpoint.tensors if model.checkpoint.read(n) == other.checkpoint.read(n)]
        assert plain.code == 0 and len(same) == len(other.checkpoint.tensors)
    again = cli("quantize", tmp_path / "out", tmp_path / "fp8", "--scheme", "fp8", "--requantize", "--json")
    assert again.code == 0 and not any(SUFFIX in n for n in open_model(tmp_path / "fp8").checkpoint.tensors)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--scheme", "nvfp4-a4"), "--scheme nvfp4-a4 needs --data"),
        (("--scheme", "nvfp4", "--data", "x"), "--method rtn does not use --data"),
        (("--scheme", "nvfp4-a4", "--method", "awq", "--data", "x"), "its factors would change the inputs"),
        (("--scheme", "int4", "--rest", "nvfp4-a4"), "--rest"),
    ],
)
def test_refused_before_any_work(cli, case, tmp_path, left_over, flags, says):
    done = cli("quantize", case[0], tmp_path / "out", "--json", *flags)
    assert done.code == 2 and says in done.json["error"]["message"], done.out
    assert not left_over(tmp_path)


def test_a_dry_run_states_the_scales_and_the_memory(cli, case, tmp_path):
    flags = ("--scheme", "nvfp4-a4", "--data", case[1], "--dry-run", "--json")
    done = cli("quantize", case[0], tmp_path / "out", *flags)
    plain = cli("quantize", case[0], tmp_path / "out", "--scheme", "nvfp4", "--dry-run", "--json")
    assert done.code == 0 and done.json["memory"]
    assert done.json["tensors"] == plain.json["tensors"] + 2 * 8 * 3
