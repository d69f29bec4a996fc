"""Mamba layers in llama.cpp: names, shapes and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.changes import without_middle_axis
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.record import Change, Number

MAMBA2 = layer(
    {
        "mamba.A": "ssm_a", "mamba.D": "ssm_d", "mamba.conv": "ssm_conv1d.weight", "mamba.conv_bias": "ssm_conv1d.bias",
        "mamba.dt": "ssm_dt.bias", "mamba.in": "ssm_in.weight", "mamba.norm": "ssm_norm.weight",
        "mamba.out": "ssm_out.weight",
    }
)  # fmt: skip
MAMBA_NUMBERS: dict[str, Number] = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.inner_size": lambda model: model.value("mamba_n_heads") * model.value("mamba_d_head"),
    "ssm.time_step_rank": "mamba_n_heads",
}


def _column(_get: Get, part: Expression) -> Mapping[str, Expression]:
    return {"": part.reshape(-1, 1)}


def decays(_get: Get, part: Expression) -> Mapping[str, Expression]:
    """A_log becomes -exp(A_log), one column per head."""
    return {"": part.negative_exp().reshape(-1, 1)}


def grouped_norm(groups: str) -> Change:
    """The weights of a norm in groups of channels: [groups, channels]."""
    return lambda get, part: {"": part.reshape(get(groups), -1)}


MAMBA2_CHANGES: dict[str, Change] = {
    "mamba.A": decays,
    "mamba.D": _column,
    "mamba.conv": without_middle_axis,
    "mamba.norm": grouped_norm("mamba_n_groups"),
}


def heads_of_attention(model: Model) -> list[int]:
    """The number of heads of keys and values in each layer; 0 in a layer without attention."""
    with_keys = {role.layer for role in model.roles.values() if role.key == "attention.k"}
    heads = model.value("num_key_value_heads") or model.value("num_attention_heads")
    return [heads if at in with_keys else 0 for at in range(model.num_layers)]
