"""AI21: Jamba."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.changes import without_middle_axis
from moeconv.quantize.gguf.llama_cpp.mamba import heads_of_attention
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import always
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp

ROWS = {
    "jamba": LlamaCpp(
        "jamba",
        names=layer(
            {
                "mamba.A": "ssm_a", "mamba.D": "ssm_d", "mamba.b_norm": "ssm_b_norm.weight",
                "mamba.c_norm": "ssm_c_norm.weight", "mamba.conv": "ssm_conv1d.weight",
                "mamba.conv_bias": "ssm_conv1d.bias", "mamba.dt_norm": "ssm_dt_norm.weight",
                "mamba.dt_bias": "ssm_dt.bias", "mamba.dt": "ssm_dt.weight", "mamba.in": "ssm_in.weight",
                "mamba.out": "ssm_out.weight", "mamba.x": "ssm_x.weight",
            }
        ),
        changes={
            "mamba.A": lambda _get, part: {"": part.negative_exp()},
            "mamba.conv": without_middle_axis,
        },
        needs={"mamba_proj_bias": (False,), "mamba_conv_bias": (True,)},
        numbers={
            "attention.head_count_kv": heads_of_attention,
            "ssm.conv_kernel": "mamba_d_conv",
            "ssm.inner_size": lambda model: model.value("mamba_expand") * model.hidden_size,
            "ssm.state_size": "mamba_d_state",
            "ssm.time_step_rank": "mamba_dt_rank",
            "rope.dimension_count": always(None),
            "rope.freq_base": always(None),
        },
        dense_layers="any",
    ),
}  # fmt: skip
