"""The results of tests/runtimes/served.py, which runs models in serving engines and compares them with transformers.

The models are random, one per family, pruned and upcycled by moeconv, and computed in float32. An engine without an
entry for a family was not run with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# the versions that were run: with the families below, and with packed experts in the records of the formats
RUNTIMES: Mapping[str, str] = {
    "transformers": "transformers 5.23.0",
    "vllm": "vLLM 0.32.0 on a CPU",
    "llama.cpp": "llama.cpp b11549",
    "mlx": "mlx-lm 0.32.2 on a CPU",
}
VERSIONS: Mapping[str, str] = {
    "vllm": RUNTIMES["vllm"],
    "llama.cpp": f"{RUNTIMES['llama.cpp']}, with the converter in llama-cpp-python 0.3.36",
    "mlx": RUNTIMES["mlx"],
}


@dataclass(frozen=True, slots=True)
class Finding:
    """How an engine runs a family: the "same" function as transformers, one that "differs", or "refused"."""

    found: str
    # conditions and causes that a user should know
    note: str = ""


_SAME = Finding("same")
_ROTATION = Finding(
    "same",
    "only with compilation_config={'custom_ops': ['-rotary_embedding']}: its CPU kernel turns interleaved pairs of "
    "several heads otherwise than its own PyTorch code does",
)
_PRUNED = Finding("same", "as pruned; an upcycled model was refused")
_YARN = Finding(
    "same",
    "as pruned; it refuses an upcycled model, since it reads the factors of YaRN in every config.json, and it has the "
    "constants of the activation of gpt-oss built in, so that it could not compute one",
)
_NO_CPU = "its CPU backend has no kernel for it; a GPU was not tried"
MEASURED: Mapping[str, Mapping[str, Finding]] = {
    "vllm": {
        **dict.fromkeys(
            (
                "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "solar_open", "hy_v3", "exaone_moe",
                "afmoe", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa",
                "hunyuan_v1_moe", "mellum", "gemma4_text",
            ),
            _SAME,
        ),
        "gpt_oss": _YARN,
        "deepseek_v3": _ROTATION,
        "glm4_moe_lite": _ROTATION,
        "lfm2_moe": Finding(
            "same", "only with its CPU kernels for rotation, normalisation and activation switched off in custom_ops"
        ),
        "ernie4_5_moe": Finding(
            "same", "where the router's correction bias is zero: its CPU backend leaves the bias out"
        ),
        "cohere2_moe": Finding("differs", "its sliding layers see one token more than sliding_window"),
        "phimoe": Finding(
            "differs", "it leaves out the bias of the head, and its router's jitter is always 0.01"
        ),
        "mimo_v2_flash": Finding("differs", "its sliding layers see one token less than those of transformers"),
        **dict.fromkeys(("nemotron_h", "jamba"), Finding("refused", _NO_CPU)),
        **dict.fromkeys(
            ("deepseek_v2", "minimax_m2", "llama4_text", "laguna", "aria_text", "dbrx", "qwen3_5_moe_text"),
            Finding("refused"),
        ),
    },
    "llama.cpp": {
        **dict.fromkeys(
            (
                "mixtral", "qwen3_moe", "dots1", "deepseek_v2", "deepseek_v3", "minimax_m2", "exaone_moe",
                "granitemoe", "granitemoeshared", "granitemoe_swa", "lfm2_moe", "cohere2_moe", "jamba",
                "dbrx", "hunyuan_v1_moe", "glm4_moe", "hy_v3", "glm4_moe_lite", "solar_open",
            ),
            _SAME,
        ),
        "gpt_oss": _PRUNED,
        "qwen2_moe": Finding(
            "same",
            "where norm_topk_prob is false: it ignores the key, and divides 0 by 0 where the gate of a shared expert "
            "is zero, so it cannot compute an upcycled model",
        ),
        "mellum": Finding(
            "same", "where rope_theta of sliding and full layers is equal: it turns both by that of the full layers"
        ),
        "nemotron_h": Finding("same", "as upcycled; a pruned model that has dense layers too was refused"),
        "granitemoehybrid": Finding(
            "differs", "its converter leaves out the rotation of models with state-space layers"
        ),
        "phimoe": Finding(
            "differs", "its norms are RMS norms, where the family has LayerNorm, and its router renormalises a softmax"
        ),
        "laguna": Finding(
            "same",
            "where layer_types is one full layer before every three sliding ones, or sliding_window is 0: its "
            "converter leaves layer_types out",
        ),
        "flex_olmo": Finding("refused", "its converter does not know the class"),
        "aria_text": Finding("refused", "its converter does not know the class"),
        "mimo_v2_flash": Finding(
            "refused", "its converter looks for partial_rotary_factor where transformers 5 has none"
        ),
    },
    "mlx": {
        **dict.fromkeys(
            (
                "qwen3_next", "deepseek_v32", "olmoe", "granitemoe", "lfm2_moe", "dbrx", "nemotron_h", "glm4_moe_lite",
                "exaone_moe", "afmoe", "laguna", "kimi_linear", "minimax_m2", "solar_open", "gemma4_text",
            ),
            _SAME,
        ),
        "mixtral": Finding(
            "same",
            "without sliding_window, rope_scaling and a head_dim of its own, and with silu: it reads none of them",
        ),
        "qwen2_moe": Finding(
            "same",
            "where norm_topk_prob is false, every layer has experts, and queries, keys and values have biases: it "
            "reads no key that says otherwise, so it computes no upcycled model",
        ),
        "qwen3_moe": Finding("same", "without sliding layers and attention_bias: it reads neither"),
        "dots1": Finding("same", "without sliding layers and attention_bias: it reads neither"),
        "mellum": Finding("same", "with a full layer, and without attention_bias"),
        "glm4_moe": Finding("same", "without rope_scaling, which it does not read, and with a head of its own"),
        "deepseek_v3": Finding("same", "with a head of its own"),
        "glm_moe_dsa": Finding("same", "up to index_topk tokens; beyond, it chooses other tokens"),
        "granitemoehybrid": Finding("same", "without rope_scaling, which it does not read"),
        "ernie4_5_moe": Finding("same", "where the router's correction bias is zero: it leaves the bias out"),
        "phimoe": Finding("same", "with silu: it does not read hidden_act"),
        "jamba": Finding("differs", "it renormalises the weights of the chosen experts"),
        "mimo_v2_flash": Finding("differs", "its sliding layers see one token less than those of transformers"),
        "gpt_oss": Finding("refused", "it reads experts in MXFP4 alone"),
        "deepseek_v2": Finding("refused", "without YaRN, which all published models have"),
    },
}  # fmt: skip


# model_types in the list of models of mlx-lm 0.32
LISTED: Mapping[str, frozenset[str]] = {
    "mlx": frozenset({
        "afmoe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "gemma4",
        "gemma4_text", "gemma4_unified", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
        "granitemoehybrid", "jamba", "kimi_k25", "kimi_linear", "laguna", "lfm2_moe", "llama4", "llama4_text",
        "longcat_flash", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "mistral3", "mistral4",
        "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
        "qwen3_vl_moe", "solar_open", "step3p5",
    }),
}  # fmt: skip


def how_known(model_type: str, target: str) -> str:
    """ "measured" if the engine was run with the family, "listed" if only its public list of models was read."""
    return "measured" if target == "transformers" or model_type in MEASURED.get(target, {}) else "listed"


def doubts(model_type: str, target: str) -> list[str]:
    """Warnings about an engine whose public list has the family."""
    if target == "transformers":
        return []
    row = MEASURED.get(target, {}).get(model_type)
    if row is None:
        return [f"{target} lists {model_type}; it was not measured here"]
    note = f": {row.note}" if row.note else ""
    where = VERSIONS[target]
    if row.found == "same":
        return [f"{where} computes {model_type} as transformers does {row.note}"] if row.note else []
    word = (
        "computes something different from transformers"
        if row.found == "differs"
        else "refused a small random model of it"
    )
    return [f"{target} lists {model_type}, but when it was measured {where} {word}{note}"]
