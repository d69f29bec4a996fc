"""NVIDIA: Nemotron and Nemotron-H."""

from __future__ import annotations

from collections.abc import Collection

from moeconv.families.model import Model
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY, plus_one, without_middle_axis
from moeconv.quantize.gguf.llama_cpp.mamba import MAMBA2, MAMBA2_CHANGES, grouped_norm, heads_of_attention
from moeconv.quantize.gguf.llama_cpp.names import NORM_BIAS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import always
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number

_SQUARED = ("relu2",)


def _layers_with(model: Model, keys: Collection[str]) -> set[int | None]:
    return {role.layer for role in model.roles.values() if role.key in keys}


def _widths(model: Model) -> list[int]:
    """The width of the FFN in each layer; 0 in a layer without one."""
    dense, moe = _layers_with(model, ("ffn.up",)), set(model.moe_layers)
    wide = model.value("intermediate_size") if dense else 0
    return [wide if at in dense else model.expert_width if at in moe else 0 for at in range(model.num_layers)]


_HYBRID: dict[str, Number] = {
    "context_length": always(1 << 20),  # it has no rotary embedding
    "feed_forward_length": _widths,
    "attention.head_count_kv": heads_of_attention,
    "attention.layer_norm_epsilon": "rms_norm_eps",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.inner_size": lambda model: model.value("mamba_num_heads") * model.value("mamba_head_dim"),
    "ssm.time_step_rank": "mamba_num_heads",
    "rope.scaling.finetuned": always(False),
    "expert_feed_forward_length": lambda model: model.expert_width if model.num_experts else None,
    "expert_shared_feed_forward_length": lambda model: model.shared_width if model.num_experts else None,
    "expert_shared_count": lambda model: model.value("n_shared_experts") if model.num_experts else None,
    "expert_weights_norm": lambda model: model.value("norm_topk_prob") if model.num_experts else None,
    "expert_weights_scale": lambda model: model.value("routed_scaling_factor") if model.num_experts else None,
    "expert_group_count": lambda model: model.value("n_group") if model.num_experts else None,
    "expert_group_used_count": lambda model: model.value("topk_group") if model.num_experts else None,
    "moe_latent_size": lambda model: model.value("moe_latent_size") if model.num_experts else None,
}


def _no_dense_layers(model: Model) -> str | None:
    """In models with experts, llama.cpp mistakes layers with a dense FFN for Mamba layers."""
    return "layers with an FFN beside layers with experts" if _layers_with(model, ("ffn.up",)) else None


_NEEDS: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,), "mlp_bias": (False,), "use_bias": (False,), "mamba_proj_bias": (False,),
    "n_group": (1, None), "mamba_hidden_act": ("silu",),
}  # fmt: skip

ROWS = {
    "nemotron": LlamaCpp(
        "nemotron",
        names=NORM_BIAS,
        changes=dict.fromkeys(("norm.attention", "norm.ffn", "norm.final"), plus_one),
        needs={"attention_bias": (False,), "mlp_bias": (False,)},
        numbers={
            "attention.layer_norm_epsilon": "norm_eps",
            "attention.layer_norm_rms_epsilon": always(None),
            "rope.scaling.type": always("none"),
        },
        activations=_SQUARED,
        rope=frozenset({"default"}),
    ),
    "nemotron_h": LlamaCpp(
        "nemotron_h_moe",
        names=MAMBA2
        | layer(
            {
                "norm.ffn": "attn_norm.weight",
                "latent.down": "ffn_latent_down.weight",
                "latent.up": "ffn_latent_up.weight",
            }
        ),
        changes=LLAMA_ROTARY
        | MAMBA2_CHANGES
        | {"mamba.norm": grouped_norm("n_groups"), "mamba.conv": without_middle_axis},
        needs=_NEEDS,
        checks=(_no_dense_layers,),
        numbers=_HYBRID,
        activations=_SQUARED,
        dense_layers="any",
    ),
}
