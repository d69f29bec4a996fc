"""llama.cpp's names of tensors, for all families: key of a matrix -> name; {L} is the layer.

The experts of a layer are one tensor [E, out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

_LAYER = "blk.{L}."


def layer(names: Mapping[str, str]) -> dict[str, str]:
    """Names of tensors in a layer, each with the layer's prefix."""
    return {key: _LAYER + name for key, name in names.items()}


NAMES: dict[str, str] = {
    "embedding.tokens": "token_embd.weight",
    "embedding.lm_head": "output.weight",
    "norm.final": "output_norm.weight",
} | layer(
    {
        "norm.attention": "attn_norm.weight",
        "norm.ffn": "ffn_norm.weight",
        **{f"attention.{p}": f"attn_{p}.weight" for p in ("q", "k", "v", "q_norm", "k_norm", "qkv")},
        "attention.o": "attn_output.weight",
        "router.weight": "ffn_gate_inp.weight",
        "router.bias": "ffn_gate_inp.bias",
        "router.correction": "exp_probs_b.bias",
        **{f"expert.{p}": f"ffn_{p}_exps.weight" for p in ("gate", "up", "down")},
        **{f"expert.{p}_bias": f"ffn_{p}_exps.bias" for p in ("gate", "up", "down")},
        **{f"shared.{p}": f"ffn_{p}_shexp.weight" for p in ("gate", "up", "down")},
        "shared.router": "ffn_gate_inp_shexp.weight",
        **{f"ffn.{p}": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
    }
)
QKV_BIAS = layer({f"attention.{p}_bias": f"attn_{p}.bias" for p in "qkv"})
O_BIAS = layer({"attention.o_bias": "attn_output.bias"})
FFN_BIAS = layer({f"ffn.{p}_bias": f"ffn_{p}.bias" for p in ("gate", "up", "down")})
NORM_BIAS = layer({"norm.attention_bias": "attn_norm.bias", "norm.ffn_bias": "ffn_norm.bias"}) | {
    "norm.final_bias": "output_norm.bias"
}
POST_NORMS = layer({"norm.post_attention": "post_attention_norm.weight", "norm.post_ffn": "post_ffw_norm.weight"})

# endings of the names of matrices that llama.cpp needs in float32, besides all norms and vectors
_FLOAT32 = (
    "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "_norm.weight",
)  # fmt: skip


def is_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp needs a tensor of the file in float32: vectors, norms, routers, and everything that is not a
    weight."""
    return len(shape) < 2 or not name.endswith(".weight") or name.endswith(_FLOAT32)
