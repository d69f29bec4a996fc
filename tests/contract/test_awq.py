"""--method awq against the stock classes: with the weights of the source in the place of the codes, the folded model
computes what the source computes. Families in which a fold would change the model keep that part as it is, or are
refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract.stock import MOE_CASES, load, logits, relative_difference, save_stock
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.families.model import Model, open_model
from moeconv.tensors import decode_weight, read_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

# case -> what the factors are folded into
FOLDED = {
    "qwen2_moe": {"norm", "up"},  # a shared expert with a router of its own, and a dense layer
    "mixtral": {"norm", "up"},
    "glm4_moe": {"norm", "up"},
    "deepseek_v3": {"norm", "up"},
    "qwen3_next": {"up"},  # its norms multiply by 1 + weight
    "cohere2_moe": {"up"},  # attention reads the same norm
}


def uneven(path: Path) -> Path:
    """The same checkpoint, with norms that let some inputs of the experts be much larger than others, and rows of up
    that do so for the inputs of down."""
    model, draw = open_model(path), torch.Generator().manual_seed(3)
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            key = model.roles[name].key
            if key == "norm.ffn":
                tensors[name] = tensor * torch.exp2(torch.randn(tensor.shape, generator=draw) * 2)
            elif key == "expert.up":
                tensors[name] = tensor * torch.exp2(torch.randn(len(tensor), 1, generator=draw) * 2)
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def factors(source: Model, model: Model, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(factors of the input of an expert, of the input of its down projection), as the written tensors have them."""
    columns = torch.ones(source.expert_dimension)
    if source.family.has("norm.ffn"):
        name = source.family.name("norm.ffn", layer=layer)
        columns = read_tensor(source.checkpoint, name) / read_tensor(model.checkpoint, name)
    name = source.expert_name("down", layer=layer, expert=expert)
    plain, packed = decode_weight(source, name), decode_weight(model, name)
    return columns, torch.exp2((packed.norm(dim=0) / plain.norm(dim=0)).log2().round())


def unrounded(source: Model, model: Model, out: Path) -> Path:
    """The written checkpoint, with the weights of the source times the factors in the place of the codes."""
    tensors = {}
    for name, role in source.roles.items():
        value = read_tensor(source.checkpoint, name)
        if role.group != "expert":
            value = read_tensor(model.checkpoint, name)
        else:
            columns, inner = factors(source, model, role.layer, role.expert)
            value = value * (inner if role.key == "expert.down" else columns)
            value = value / inner[:, None] if role.key == "expert.up" else value
        tensors[name] = value.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source.checkpoint.path / "config.json").read_text())
    return out


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("case", FOLDED)
def test_before_rounding_the_folded_model_computes_the_same(cli, tmp_path, case, monkeypatch):
    monkeypatch.setattr("moeconv.quantize.gptq.awq.ALPHAS", (0.5,))  # factors, whether or not they help random weights
    monkeypatch.setattr("moeconv.data.heldout.clearly_less", lambda *_: True)
    model_type, config = MOE_CASES[case]
    path = add_tokenizer(uneven(save_stock(tmp_path / "moe", model_type, config, dtype=torch.float32)))
    (tmp_path / "text.txt").write_text(text(1200, seed=1))
    asked = ("--data", tmp_path / "text.txt", "--seq-len", 16, "--method", "awq", "--scheme", "int8")
    done = cli("quantize", path, tmp_path / "out", *asked, "--group-size", 32, "--json")
    assert done.code == 0, done.out
    rows = done.json["quantize"]["error"]["output"]["layers"]
    assert rows and all({*row["folded"]} == FOLDED[case] and row["method"] == "awq" for row in rows)
    assert any("keep their scale" in w for w in done.json["warnings"]) == (FOLDED[case] != {"norm", "up"})
    source, model = open_model(path), open_model(tmp_path / "out")
    columns, inner = factors(source, model, source.moe_layers[0], 1)
    assert torch.equal(torch.exp2(columns.log2().round()), columns)
    assert (len(columns.unique()) > 2) == ("norm" in FOLDED[case]) and len(inner.unique()) > 2
    again = logits(load(unrounded(source, model, tmp_path / "plain")))
    assert relative_difference(again, logits(load(path))) < 1e-5
