"""Tiny checkpoints with packed experts, and the stock models of what they decode to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moeconv.plan.kernels import pack

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8},
    "qwen2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 48, "num_experts": 8,
        "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 96, "num_experts": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 16,
    },
    "olmoe": {"intermediate_size": 96, "num_experts": 8},
}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
OTHERS = {  # other names on disk, dense first layers, shared experts, correction biases
    "deepseek_v3": {**MLA, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 8, "head_dim": 16},
    "phimoe": {"num_local_experts": 8},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
}
SCHEMES = ["nf4", "fp4", "int8", "nf4-nested"]
EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def encode(weight: torch.Tensor, name: str, scheme: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that replace `name` on disk, and the weight that they decode to."""
    if scheme == "int8":
        parts = pack.pack_int8_rowwise(weight)
        stored = {name: parts[""], name.removesuffix("weight") + "SCB": parts["SCB"]}
        return stored, pack.unpack_int8_rowwise(parts, dtype=weight.dtype)
    quant_type, _, nested = scheme.partition("-")
    parts = pack.pack_nf4(weight, quant_type=quant_type, nested=bool(nested))
    return {f"{name}.{key}".rstrip("."): tensor for key, tensor in parts.items()}, pack.unpack_nf4(parts)


def quantization_config(scheme: str) -> dict:
    four, nested = scheme != "int8", scheme.endswith("-nested")
    scheme = scheme.partition("-")[0]
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme if four else "fp4", "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"],
        "moeconv": {"format": "bitsandbytes", "scheme": scheme, "block_size": 64, "scope": "experts"},
    }  # fmt: skip


def make(folder: Path, family: str, scheme, *, dtype=torch.bfloat16, also=None, **changes) -> tuple[Path, Path]:
    """A tiny random model, saved twice: experts packed, and the stock model of what they decode to.

    `scheme` is a name, or a function from a layer's number to a name or None (left unpacked); `also` a pattern of
    further weights to pack."""
    scheme_of = scheme if callable(scheme) else lambda _layer: scheme
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # livelier logits than the initial 0.02 gives
    plain, packed = folder / "plain", folder / "packed"
    model.save_pretrained(plain)
    weights = load_file(plain / "model.safetensors")
    assert any(EXPERT.search(name) for name in weights)  # the hub's per-expert layout
    stored, decoded = {}, {}
    for name, weight in weights.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        packs = layer and (EXPERT.search(name) or (also and also.search(name)))
        chosen = scheme_of(int(layer[1])) if packs else None
        if chosen:
            tensors, decoded[name] = encode(weight, name, chosen)
            stored.update(tensors)
        else:
            stored[name] = decoded[name] = weight
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((plain / "config.json").read_text())
    fields["quantization_config"] = quantization_config(scheme_of(0) or "nf4")
    (packed / "config.json").write_text(json.dumps(fields))
    return packed, plain


def load(folder: Path, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def experts_of(model) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def held_bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(7))


def stacked(folder: Path, cli, scheme: str = "nf4 --double-quant") -> Path:
    """A tiny GPT-OSS (biases per expert, [in, out], gate and up interleaved), quantized by the command."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_oss", **COMMON, intermediate_size=96, num_local_experts=8, head_dim=16),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder / "source")
    flags = ("--format", "bitsandbytes", "--self-contained", "--scheme", *scheme.split(), "--json")
    done = cli("quantize", folder / "source", folder / "packed", *flags)
    assert done.code == 0, done.out
    return folder / "packed"
