"""Every family that GGUF is written for: the keys, tensors, dtypes and shapes that llama.cpp's converter writes for the
same model. gguf_converted.json has what it writes (tests/runtimes/converted.py makes it); the values of the tensors and
the logits are compared in tests/runtimes/test_gguf_families.py, where the programs are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contract.gguf_cases import CASES, make

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.gguf.llama_cpp import LLAMA_CPP
from moeconv.quantize.planner import plan_quantize

gguf = pytest.importorskip("gguf")
TABLE = json.loads((Path(__file__).parent / "gguf_converted.json").read_text())
# ends of keys that the converter leaves out where config.json does, or everywhere; llama.cpp assumes the same values
EXTRA = (
    ".attention.key_length", ".attention.value_length", ".vocab_size", ".rope.dimension_count", ".rope.freq_base",
    ".expert_gating_func", ".expert_weights_norm", ".leading_dense_block_count", ".attention.sliding_window_pattern",
    "ggml.add_bos_token", "ggml.add_eos_token",
)  # fmt: skip
# case (or its beginning with *), end of the key -> why the value is another one
OTHERWISE = {
    ("bamba", ".rope.dimension_count"): "the converter does not know partial_rotary_factor of Bamba",
    ("granitemoehybrid*", ".context_length"): "the converter knows the older words of layer_types alone, so that it "
    "finds no layer of attention",
    ("granitemoehybrid*", ".attention.head_count_kv"): "the same",
    ("granitemoehybrid*", ".rope.scaling.finetuned"): "the same",
    ("granitemoehybrid", ".expert_count"): "the dense model has no experts",
    ("granitemoehybrid", ".expert_used_count"): "the same",
    ("ernie4_5_moe*", ".expert_shared_feed_forward_length"): "the converter divides intermediate_size by the number of "
    "heads of keys, which is the width in published models",
    ("solar_open*", ".rope.dimension_count"): "the converter takes half of the head for rotating",
    ("glm4_moe_lite*", ".leading_dense_block_count"): "the converter does not read mlp_layer_types",
    ("qwen3_5*", ".rope.dimension_sections"): "the converter assumes the sizes of published models",
    ("qwen3_5_text", ".full_attention_interval"): "the converter assumes 4 where config.json leaves it out",
    ("exaone_moe*", ".nextn_predict_layers"): "prediction layers are left out",
    ("llama4*", ".attention.sliding_window"): "not read",
    **{
        (case, ".attention.layer_norm_rms_epsilon"): "the family has no RMSNorm"
        for case in ("cohere", "nemotron", "olmo*", "stablelm")
    },
    ("olmo3", ".attention.sliding_window*"): "no layer has a window",
    ("olmo3", ".rope.freq_base_swa"): "the same",
    ("olmo3-sliding", ".rope.freq_base_swa"): "it is that of the other layers, which llama.cpp assumes",
    ("afmoe", ".expert_group_count"): "there is one group",
    ("afmoe", ".expert_group_used_count"): "the same",
}  # fmt: skip
_FEW = ("llama", "qwen3", "gpt_oss experts", "deepseek_v3 experts", "qwen3_next experts", "gemma4 experts")


def _matches(pattern: str, text: str, *, end: bool) -> bool:
    if pattern.endswith("*"):
        return pattern[:-1] in text if end else text.startswith(pattern[:-1])
    return text.endswith(pattern) if end else text.removesuffix(" experts") == pattern


def _explained(case: str, key: str) -> bool:
    return any(_matches(name, case, end=False) and _matches(part, key, end=True) for name, part in OTHERWISE)


def _same(mine: object, other: object) -> bool:
    if isinstance(other, float):
        return isinstance(mine, float) and mine == pytest.approx(other, rel=1e-6)
    if isinstance(other, list) and isinstance(mine, list):
        return len(mine) == len(other) and all(map(_same, mine, other))
    return type(mine) is type(other) and mine == other


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _FEW else pytest.mark.slow) for name in TABLE if name in CASES]
)
def test_the_file_has_what_the_converter_writes(tmp_path, name):
    model = open_model(make(tmp_path / "source", name))
    execute(plan_quantize(model, format="gguf", scheme="f16"), source=model.checkpoint, out=tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    wanted = TABLE[name]
    wrong = {
        key: (keys.get(key), value)
        for key, value in wanted["keys"].items()
        if not (key in keys and _same(keys[key], value)) and not _explained(name, key) and "size_label" not in key
    }
    assert not wrong
    own = {key for key in keys if not key.startswith(("GGUF.", "general.", "tokenizer.ggml.to", "tokenizer.ggml.m"))}
    assert not {key for key in own - set(wanted["keys"]) if not key.endswith(EXTRA) and not _explained(name, key)}
    tensors = {t.name: [t.tensor_type.name, [int(n) for n in reversed(t.shape)]] for t in reader.tensors}
    for key, entry in wanted["tensors"].items():
        if name == "dbrx experts" and key.endswith("ffn_gate_inp.weight"):
            entry[0] = "F32"  # as in all other families
    if name.startswith("ernie4_5_moe"):  # a vector, which the converter keeps as a matrix of one row
        rows = {key: [kind, shape[-1:]] for key, (kind, shape) in wanted["tensors"].items() if key.endswith(".bias")}
        wanted["tensors"] |= rows
    assert tensors == wanted["tensors"]


def test_every_row_has_a_case():
    assert set(LLAMA_CPP) <= {kind for kind, _, _ in CASES.values()}


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_next experts", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("afmoe experts", {"mup_enabled": False}, "mup_enabled"),
        ("llama4 experts", {"attention_chunk_size": 16}, "chunks of attention"),
        ("gpt_oss experts", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("deepseek_v2 experts", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("deepseek_v3 experts", {"q_lora_rank": None}, "without low rank"),
        ("mistral", {"sliding_window": 5}, "sliding-window"),
        ("gemma", {"tie_word_embeddings": False}, "output head"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, monkeypatch, name, changes, says):
    kind, config, limit = CASES[name]
    monkeypatch.setitem(CASES, name, (kind, config | changes, limit))
    with pytest.raises(InputError, match=says):
        plan_quantize(open_model(make(tmp_path / "source", name)), format="gguf", scheme="f16")
