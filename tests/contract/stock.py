"""Stock transformers models for the contract suite: one tiny config a family row, random in every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, HIDDEN = 128, 64
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.05,
}  # fmt: skip
_DENSE = _COMMON | {"intermediate_size": 96}
_MOE = _COMMON | {"num_experts_per_tok": 2}

# name of the case -> (model_type, config). Every dense row and every way in which it can differ.
DENSE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DENSE),
    "llama-tied": ("llama", _DENSE | {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", _DENSE | {"head_dim": 32}),
    "llama-rope": ("llama", _DENSE | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
    "mistral": ("mistral", _DENSE | {"sliding_window": None}),
    "mistral-sliding": ("mistral", _DENSE | {"sliding_window": 5}),
    "qwen2": ("qwen2", _DENSE),
    "qwen2-tied": ("qwen2", _DENSE | {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", _DENSE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", _DENSE | {"head_dim": 32}),
    "qwen3-tied": ("qwen3", _DENSE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-sliding": (
        "qwen3",
        _DENSE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3-attention-bias": ("qwen3", _DENSE | {"head_dim": 16, "attention_bias": True}),
}
# Features that the target cannot express: (model_type, config, --to, word that the refusal names)
REFUSED: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "llama attention_bias -> mixtral": ("llama", _DENSE | {"attention_bias": True}, None, "attention_bias"),
    "llama mlp_bias -> mixtral": ("llama", _DENSE | {"mlp_bias": True}, None, "mlp_bias"),
    "qwen2 -> mixtral": ("qwen2", _DENSE, "mixtral", "biases"),
    "llama -> qwen3_moe": ("llama", _DENSE, "qwen3_moe", "normalises"),
    "qwen3 mixed sliding -> qwen3_moe": (
        "qwen3",
        _DENSE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        None,
        "sliding",
    ),
}
_QWEN_MOE = _MOE | {"moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True}
MOE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _MOE | {"intermediate_size": 96, "num_local_experts": 8}),
    "qwen2_moe": (
        "qwen2_moe",
        _QWEN_MOE | {"num_experts": 8, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("qwen3_moe", _QWEN_MOE | {"num_experts": 8, "head_dim": 16}),
    "qwen3_moe-step": ("qwen3_moe", _QWEN_MOE | {"num_experts": 8, "head_dim": 16, "decoder_sparse_step": 2}),
    "olmoe": ("olmoe", _MOE | {"intermediate_size": 64, "num_experts": 8, "norm_topk_prob": False}),
}


def save_stock(path: Path, model_type: str, config: dict[str, Any], *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Save a random stock model with save_pretrained; biases and norms are random too, unlike a fresh model's."""
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.08) + ("norm" in name))
    model.to(dtype).save_pretrained(path, max_shard_size="200KB")
    return path


def load(path: Path, *, dtype: torch.dtype = torch.float32, experts: str = "eager") -> Any:
    """The stock model, loaded strictly: a tensor that is missing, unexpected or of the wrong shape fails the test."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, experts_implementation=experts, trust_remote_code=False
    )
    wrong = {key: value for key, value in info.items() if value and key != "error_msgs"}
    assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def logits(model: Any, *, length: int = 24, batch: int = 2) -> torch.Tensor:
    """Logits of seeded random tokens, [batch, length, vocabulary]; longer than every sliding window of the cases."""
    tokens = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))
    return model(input_ids=tokens).logits


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of the spread of `a`."""
    return float((a - b).abs().max() / a.std())
