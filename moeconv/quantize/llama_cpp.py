"""The names that llama.cpp has for families and tensors, as data: one row per family, one table of tensor names for
all.

A family has a row only where llama.cpp computes what transformers computes; `needs` has the config values for which
that is so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import Role

# key of a matrix -> llama.cpp's name without .weight; {L} is the layer. Experts of a layer are one tensor [E, out, in].
NAMES: dict[str, str] = {
    "embedding.tokens": "token_embd",
    "embedding.lm_head": "output",
    "norm.final": "output_norm",
    "norm.attention": "blk.{L}.attn_norm",
    "norm.ffn": "blk.{L}.ffn_norm",
    **{f"attention.{p}": f"blk.{{L}}.attn_{p}" for p in ("q", "k", "v", "q_norm", "k_norm")},
    "attention.o": "blk.{L}.attn_output",
    "router.weight": "blk.{L}.ffn_gate_inp",
    "router.correction": "blk.{L}.exp_probs_b",
    **{f"expert.{p}": f"blk.{{L}}.ffn_{p}_exps" for p in ("gate", "up", "down")},
    **{f"shared.{p}": f"blk.{{L}}.ffn_{p}_shexp" for p in ("gate", "up", "down")},
    "shared.router": "blk.{L}.ffn_gate_inp_shexp",
    **{f"ffn.{p}": f"blk.{{L}}.ffn_{p}" for p in ("gate", "up", "down")},
}
# the tensors that llama.cpp needs in float32
FLOAT32 = ("norm.", "router.", "shared.router")
_QKV_BIAS = ("attention.q_bias", "attention.k_bias", "attention.v_bias")


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """One family of llama.cpp.

    `interleaved`: its rotary embedding rotates adjacent pairs where transformers rotates halves. `needs` maps a config
    key to the values that llama.cpp assumes. `biases` has the keys of the biases that it reads. `numbers` maps metadata
    keys (without the architecture) to config keys, `fixed` is metadata that every model has, and `rename` has other
    names for some keys.
    """

    arch: str
    interleaved: bool = False
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    dense_layers: bool = False  # whether leading layers may be dense
    grouped_query: bool = True  # whether keys and values may have fewer heads


_EVERY_LAYER: dict[str, tuple[object, ...]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}
_SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
_DEEPSEEK_NUMBERS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}

LLAMA_CPP: dict[str, LlamaCpp] = {
    "mixtral": LlamaCpp("llama", interleaved=True),
    "qwen2_moe": LlamaCpp(
        "qwen2moe",
        needs={**_EVERY_LAYER, "norm_topk_prob": (False,)},
        biases=_QKV_BIAS,
        numbers={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
    ),
    "qwen3_moe": LlamaCpp(
        "qwen3moe",
        needs={**_EVERY_LAYER, "norm_topk_prob": (True,), "attention_bias": (False,)},
        numbers={"expert_feed_forward_length": "moe_intermediate_size"},
    ),
    "olmoe": LlamaCpp(
        "olmoe",
        needs={"norm_topk_prob": (False,), "clip_qkv": (None,), "attention_bias": (False,)},
        grouped_query=False,
    ),
    "dots1": LlamaCpp(
        "dots1",
        needs={"n_group": (1, None), "topk_group": (1, None), "attention_bias": (False,)},
        numbers=_DEEPSEEK_NUMBERS,
        fixed={"expert_gating_func": _SIGMOID},
        dense_layers=True,
        grouped_query=False,
    ),
    "glm4_moe": LlamaCpp(
        "glm4moe",
        needs={
            "n_group": (1, None),
            "topk_group": (1, None),
        },
        biases=_QKV_BIAS,
        numbers=_DEEPSEEK_NUMBERS,
        fixed={"expert_gating_func": _SIGMOID},
        rename={"norm.ffn": "blk.{L}.post_attention_norm"},
        dense_layers=True,
    ),
}


def find_row(model: Model) -> LlamaCpp:
    """The row of a model's family.

    Raises InputError for a family without a row, and for a config with which llama.cpp would compute something else."""
    family = model.family
    row = LLAMA_CPP.get(family.model_type)
    if row is None:
        raise InputError(
            f"--format gguf does not support {family.model_type}",
            hint=f"It supports {', '.join(sorted(LLAMA_CPP))}. `moeconv formats` lists other formats.",
        )

    def refuse(what: str) -> InputError:
        return InputError(f"llama.cpp's {row.arch} cannot compute {what}", hint="Choose another --format.")

    for key, allowed in row.needs.items():
        if key in family.config.defaults and model.value(key) not in allowed:
            raise refuse(f"{key} = {escape(model.value(key))}")
    activation = model.value("hidden_act")
    if activation not in ("silu", "swish"):
        raise refuse(f"hidden_act = {escape(activation)}")
    heads = model.value("num_attention_heads")
    if not row.grouped_query and (model.value("num_key_value_heads") or heads) != heads:
        raise refuse("fewer heads of keys and values than of queries")
    if model.sliding.kind != "none":
        raise refuse("sliding-window attention")
    for role in model.roles.values():
        if role.layer not in model.prediction_layers and _template(row, role.key) is None:
            raise refuse(f"{role.key} ({escape(family.name(role.key, layer=role.layer, expert=role.expert))})")
    first = model.num_layers - len(model.moe_layers)
    if model.moe_layers != tuple(range(first, model.num_layers)) or (first and not row.dense_layers):
        raise refuse(f"dense layers between layers with experts ({len(model.moe_layers)} of {model.num_layers})")
    return row


def tensor_name(row: LlamaCpp, role: Role) -> str:
    """The name of a tensor in the file; all experts of a layer share one tensor."""
    template = _template(row, role.key)
    assert template is not None
    return template.replace("{L}", str(role.layer))


def _template(row: LlamaCpp, key: str) -> str | None:
    if key in row.biases:
        return f"{NAMES[key.removesuffix('_bias')]}.bias"
    name = row.rename.get(key) or NAMES.get(key)
    suffix = ".bias" if key == "router.correction" else ".weight"
    return None if name is None else name + suffix
