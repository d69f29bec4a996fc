"""What tests/runtimes/served.py measured: random models of each family, pruned and upcycled by moeconv, computed by an
engine in float32 and compared with transformers. An engine that is not here for a family was not run with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSIONS: Mapping[str, str] = {
    "vllm": "vLLM 0.32.0 on a CPU",
    "llama.cpp": "llama.cpp b11549, with the converter in llama-cpp-python 0.3.36",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """How an engine runs a family: "same" function, "differs", or "refused"."""

    found: str
    # what one should know of it
    note: str = ""


_SAME = Measured("same")
_ROTATION = Measured(
    "same",
    "only with compilation_config={'custom_ops': ['-rotary_embedding']}: its CPU kernel turns interleaved pairs of "
    "several heads otherwise than its own PyTorch code does",
)
_NO_CPU = "its CPU backend has no kernel for it; a GPU was not tried"
MEASURED: Mapping[str, Mapping[str, Measured]] = {
    "vllm": {
        **dict.fromkeys(
            (
                "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "solar_open", "hy_v3", "exaone_moe",
                "afmoe", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "gpt_oss",
                "hunyuan_v1_moe", "mellum", "gemma4_text",
            ),
            _SAME,
        ),
        "deepseek_v3": _ROTATION,
        "glm4_moe_lite": _ROTATION,
        "lfm2_moe": Measured(
            "same", "only with its CPU kernels for rotation, normalisation and activation switched off in custom_ops"
        ),
        "ernie4_5_moe": Measured(
            "same", "where the router's correction bias is zero: its CPU backend leaves the bias out"
        ),
        "cohere2_moe": Measured("differs"),
        "phimoe": Measured("differs"),
        "mimo_v2_flash": Measured("differs"),
        **dict.fromkeys(("nemotron_h", "jamba", "deepseek_v2", "minimax_m2"), Measured("refused", _NO_CPU)),
        **dict.fromkeys(("llama4_text", "laguna", "aria_text", "dbrx", "qwen3_5_moe_text"), Measured("refused")),
    },
    "llama.cpp": {
        **dict.fromkeys(
            (
                "mixtral", "qwen2_moe", "qwen3_moe", "dots1", "deepseek_v2", "deepseek_v3", "minimax_m2", "exaone_moe",
                "granitemoe", "granitemoeshared", "granitemoe_swa", "lfm2_moe", "cohere2_moe", "gpt_oss", "jamba",
                "dbrx", "hunyuan_v1_moe", "glm4_moe", "hy_v3", "glm4_moe_lite",
            ),
            _SAME,
        ),
        "mellum": Measured("same", "where every layer attends to all tokens; it differs with layers of both kinds"),
        "nemotron_h": Measured("same", "as upcycled; a pruned model that has dense layers too was refused"),
        "granitemoehybrid": Measured(
            "differs", "its converter leaves out the rotation of models with state-space layers"
        ),
        "phimoe": Measured("differs"),
        "laguna": Measured("differs"),
        "solar_open": Measured("differs"),
        "flex_olmo": Measured("refused", "its converter does not know the class"),
        "aria_text": Measured("refused", "its converter does not know the class"),
        "mimo_v2_flash": Measured(
            "refused", "its converter looks for partial_rotary_factor where transformers 5 has none"
        ),
    },
}  # fmt: skip


def how_known(model_type: str, target: str) -> str:
    """ "measured" or "listed": whether an engine was run with the family, or only has it in its public list or not."""
    return "measured" if target == "transformers" or model_type in MEASURED.get(target, {}) else "listed"


def doubts(model_type: str, target: str) -> list[str]:
    """What to warn of where an engine is said to run a family."""
    if target == "transformers":
        return []
    row = MEASURED.get(target, {}).get(model_type)
    if row is None:
        return [f"{target} lists {model_type}; it was not measured here"]
    note = f": {row.note}" if row.note else ""
    where = VERSIONS[target]
    if row.found == "same":
        return [f"{where} computes {model_type} as transformers does {row.note}"] if row.note else []
    word = "computes something else than transformers" if row.found == "differs" else "refused it"
    return [f"{target} lists {model_type}, but when it was measured {where} {word}{note}"]
