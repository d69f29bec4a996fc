"""Contract: families whose class is code in their checkpoints, against the stock class that computes the same.

Each layout on the hub is written here by hand, from the public description of the model, out of a stock model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.stream.layers import LayerStream
from tests.contract.stock import (
    HIDDEN,
    VOCAB,
    load,
    logits,
    relative_difference,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]
LAYERS, HEADS, KV, FFN = 3, 8, 2, 96
HEAD = HIDDEN // HEADS
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "intermediate_size": FFN, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": False, "head_dim": HEAD,
}  # fmt: skip
OLD = {**{k: v for k, v in SIZES.items() if k not in ("rope_parameters", "head_dim")}, "rope_theta": 5e5}
BLOCK = {
    "norm.attention": "input_layernorm.weight", "norm.ffn": "post_attention_layernorm.weight",
    "o": "self_attn.o_proj.weight", "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}  # fmt: skip


def _qkv(t: Tensors, layer: int, kind: str = "weight") -> list[torch.Tensor]:
    return [t[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]


def _renamed(t: Tensors, outside: dict[str, str], layer: str, inside: dict[str, str]) -> Tensors:
    """The tensors of a stock model under other names; `inside` are those of BLOCK."""
    made = {new: t[old] for new, old in outside.items() if old in t}
    for i in range(LAYERS):
        made |= {layer.format(i) + new: t[f"model.layers.{i}.{BLOCK[key]}"] for key, new in inside.items()}
    return made


def _internlm2(t: Tensors) -> Tensors:
    """wqkv: for each head of keys and values, the queries that attend to it, then the keys, then the values."""
    outside = {"model.tok_embeddings.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
               "model.norm.weight": "model.norm.weight"}  # fmt: skip
    inside = {
        "norm.attention": "attention_norm.weight", "norm.ffn": "ffn_norm.weight", "o": "attention.wo.weight",
        "gate": "feed_forward.w1.weight", "up": "feed_forward.w3.weight", "down": "feed_forward.w2.weight",
    }  # fmt: skip
    made = _renamed(t, outside, "model.layers.{}.", inside)
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            if f"model.layers.{i}.self_attn.q_proj.{kind}" in t:
                q, k, v = (x.view(KV, -1, HEAD, *x.shape[1:]) for x in _qkv(t, i, kind))
                made[f"model.layers.{i}.attention.wqkv.{kind}"] = torch.cat([q, k, v], 1).flatten(0, 2)
        if f"model.layers.{i}.self_attn.o_proj.bias" in t:
            made[f"model.layers.{i}.attention.wo.bias"] = t[f"model.layers.{i}.self_attn.o_proj.bias"]
    return made


_BIASES = {"attention_bias": True}


def _baichuan(t: Tensors) -> Tensors:
    gone = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    made = {name: x for name, x in t.items() if not name.endswith(gone)}
    return made | {f"model.layers.{i}.self_attn.W_pack.weight": torch.cat(_qkv(t, i)) for i in range(LAYERS)}


def _chatglm(t: Tensors) -> Tensors:
    outside = {
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.output_layer.weight": "lm_head.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    }
    inside = {
        "norm.attention": "input_layernorm.weight", "norm.ffn": "post_attention_layernorm.weight",
        "o": "self_attention.dense.weight", "down": "mlp.dense_4h_to_h.weight",
    }  # fmt: skip
    made = _renamed(t, outside, "transformer.encoder.layers.{}.", inside)
    for i in range(LAYERS):
        at = f"transformer.encoder.layers.{i}."
        made[at + "self_attention.query_key_value.weight"] = torch.cat(_qkv(t, i))
        made[at + "self_attention.query_key_value.bias"] = torch.cat(_qkv(t, i, "bias"))
        made[at + "mlp.dense_h_to_4h.weight"] = t[f"model.layers.{i}.mlp.gate_up_proj.weight"]
    return made | {"transformer.rotary_pos_emb.inv_freq": torch.ones(HEAD // 4)}


def _exaone(t: Tensors) -> Tensors:
    outside = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight",
               "transformer.ln_f.weight": "model.norm.weight"}  # fmt: skip
    inside = {
        "norm.attention": "ln_1.weight", "norm.ffn": "ln_2.weight", "o": "attn.attention.out_proj.weight",
        "gate": "mlp.c_fc_0.weight", "up": "mlp.c_fc_1.weight", "down": "mlp.c_proj.weight",
    }  # fmt: skip
    made = _renamed(t, outside, "transformer.h.{}.", inside)
    for i in range(LAYERS):
        for part, x in zip("qkv", _qkv(t, i), strict=True):
            made[f"transformer.h.{i}.attn.attention.{part}_proj.weight"] = x
    return made


def _mimo(t: Tensors) -> Tensors:
    """With one prediction layer, which is a layer of the model with three more norms and a projection."""
    first = {n: x for n, x in t.items() if n.startswith("model.layers.0.")}
    made = t | {n.replace("model.layers.", "model.mtp_layers."): x.clone() for n, x in first.items()}
    norm = t["model.norm.weight"]
    made |= {f"model.mtp_layers.0.{n}_layernorm.weight": norm.clone() for n in ("token", "hidden", "final")}
    return made | {"model.mtp_layers.0.input_proj.weight": torch.cat([torch.eye(HIDDEN)] * 2, 1)}


_GLM = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "kv_channels": HEAD, "multi_query_attention": True, "multi_query_group_num": KV, "padded_vocab_size": VOCAB,
        "seq_length": 64, "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True,
        "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "original_rope": True,
        "rope_ratio": 50, "tie_word_embeddings": False, "pad_token_id": 0}  # fmt: skip
# case -> (model_type, config on the hub, stock family, config of the stock family, its tensors -> those on the hub)
Case = tuple[str, dict[str, Any], str, dict[str, Any], Callable[[Tensors], Tensors]]
CASES: dict[str, Case] = {
    "internlm2": ("internlm2", OLD | {"bias": False, "attn_implementation": "eager"}, "llama", SIZES, _internlm2),
    "internlm2-dynamic": (
        "internlm2", OLD | {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama",
        SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}}, _internlm2,
    ),
    "internlm2-bias": ("internlm2", OLD | {"bias": True}, "llama", SIZES | _BIASES, _internlm2),
    "baichuan": (
        "baichuan", {k: v for k, v in OLD.items() if k not in ("rope_theta", "num_key_value_heads")} | {
            "model_max_length": 64, "_from_model_config": True}, "llama",
        SIZES | {"num_key_value_heads": HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        _baichuan,
    ),
    "chatglm": (
        "chatglm", _GLM, "glm",
        SIZES | {"attention_bias": True, "pad_token_id": 0,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        _chatglm,
    ),
    "exaone": (
        "exaone",
        {"activation_function": "silu", "num_layers": LAYERS, "layer_norm_epsilon": 1e-5} | {
            k: v for k, v in OLD.items() if k not in ("num_hidden_layers", "rms_norm_eps")},
        "llama", SIZES, _exaone,
    ),
    "mimo": (
        "mimo",
        OLD | {"head_dim": HEAD, "attention_bias": True, "num_nextn_predict_layers": 1, "use_mrope": False,
               "sliding_window": 64, "max_window_layers": 2, "use_sliding_window": False},
        "qwen2", {k: v for k, v in SIZES.items() if k != "head_dim"}, _mimo,
    ),
    "minicpm": (
        "minicpm", OLD | {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4}, "granite",
        {k: v for k, v in SIZES.items() if k != "head_dim"} | {
            "embedding_multiplier": 12.0, "logits_scaling": HIDDEN / 16, "residual_multiplier": 1.4 / LAYERS**0.5,
            "attention_multiplier": HEAD**-0.5},
        dict,
    ),
}  # fmt: skip
EVERY_PAIR = [
    pytest.param(case, pair, id=f"{case}->{pair.target}")
    for case, (model_type, *_) in CASES.items()
    for pair in tables().pairs
    if pair.source == model_type and (case.endswith("bias") == (pair.target == "granitemoe") or model_type == "minicpm")
]


def save_hub(path: Path, case: str) -> tuple[Path, torch.Tensor]:
    """A checkpoint in the layout of the hub, and the logits of the stock model that it was made of."""
    model_type, config, stock, stock_config, layout = CASES[case]
    made = save_stock(path / "stock", stock, stock_config, dtype=torch.float32)
    before = logits(load(made))
    tensors = {n: x for file in sorted(made.glob("*.safetensors")) for n, x in load_file(file).items()}
    (path / "hub").mkdir()
    save_file({n: x.contiguous() for n, x in layout(tensors).items()}, path / "hub" / "model.safetensors")
    told = {"model_type": model_type, "torch_dtype": "float32", "auto_map": {"AutoModel": "modeling_x.Model"}}
    (path / "hub" / "config.json").write_text(json.dumps(config | told))
    return path / "hub", before


def test_every_family_without_a_stock_class_is_converted_below():
    assert {CASES[case][0] for case in CASES} == {name for name, row in tables().dense.items() if row.runs_as}
    covered = {(p.values[1].source, p.values[1].target) for p in EVERY_PAIR}
    assert covered == {(p.source, p.target) for p in tables().pairs if p.source in {c[0] for c in CASES.values()}}


@pytest.mark.parametrize(("case", "pair"), EVERY_PAIR)
def test_the_layout_of_the_hub_computes_what_the_stock_class_does(tmp_path, cli, case, pair):
    source, before = save_hub(tmp_path, case)
    arguments = ("--experts", 4, "--to", pair.target, "--no-check", "--json")
    done = cli("upcycle", source, tmp_path / "moe", *arguments)
    assert done.code == 0, done.out
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == pair.target
    assert relative_difference(before, logits(moe)) <= 1e-5
    assert "auto_map" not in json.loads((tmp_path / "moe" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["internlm2", "chatglm", "minicpm"])
def test_the_result_is_checked_against_the_stock_class(tmp_path, cli, case):
    skip_where_stock_is_broken({"minicpm": "granitemoe"}.get(case, ""))
    source, _ = save_hub(tmp_path, case)
    method = "drop" if case == "internlm2" else "copy"
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--method", method, "--json")
    assert done.code == 0, done.out
    check = done.json["upcycle"]["equivalence"]
    assert check["checked"] and (check.get("counterpart") or check)["relative"] <= 1e-5


def test_baichuan_2_divides_the_rows_of_its_head_by_their_lengths(tmp_path, cli):
    """Its vocabulary tells it from Baichuan, so that this model has the real one."""
    vocabulary = 125696
    config = CASES["baichuan"][3] | {"vocab_size": vocabulary, "hidden_size": 16, "num_attention_heads": 2,
                                     "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}  # fmt: skip
    made = save_stock(tmp_path / "stock", "llama", config, dtype=torch.float32)
    tensors = {n: x for file in sorted(made.glob("*.safetensors")) for n, x in load_file(file).items()}
    stock = load(made)
    stock.lm_head.weight.data = torch.nn.functional.normalize(stock.lm_head.weight.data)
    expected = logits(stock, length=8, batch=1)
    (tmp_path / "hub").mkdir()
    save_file({n: x.contiguous() for n, x in _baichuan(tensors).items()}, tmp_path / "hub" / "model.safetensors")
    hub = {k: v for k, v in config.items() if k not in ("rope_parameters", "num_key_value_heads", "head_dim")}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(hub | {"model_type": "baichuan"}))
    done = cli("upcycle", tmp_path / "hub", tmp_path / "moe", "--experts", 4, "--no-check", "--json")
    assert done.code == 0, done.out
    assert relative_difference(expected, logits(load(tmp_path / "moe"), length=8, batch=1)) <= 1e-5


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("baichuan", {"max_position_embeddings": None}, "ALiBi"),
        ("chatglm", {"post_layer_norm": False}, "post_layer_norm"),
        ("chatglm", {"pre_seq_len": 128}, "P-Tuning"),
        ("internlm2-bias", {}, "bias"),
    ],
)
def test_settings_that_no_stock_class_has_are_refused(tmp_path, cli, case, changes, word):
    source, _ = save_hub(tmp_path, case)
    config = json.loads((source / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (source / "config.json").write_text(json.dumps(kept))
    refused = cli("upcycle", source, tmp_path / "moe", "--json")
    assert refused.code == 3 and word in refused.json["error"]["message"], refused.out


def test_running_the_source_is_refused_since_its_class_is_code(tmp_path, cli):
    source, _ = save_hub(tmp_path, "internlm2")
    with pytest.raises(InputError, match="code in the checkpoint"):
        LayerStream(open_model(source), torch.arange(3, 11).view(1, 8))
    warned = cli("inspect", source, "--json").json["warnings"]
    assert any("auto_map" in text and "has a stock class" in text for text in warned), warned
