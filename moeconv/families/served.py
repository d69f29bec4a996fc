"""Which serving engines run which Mixture-of-Experts family: data from their public lists of models (2026).

A family that is in neither set of a runtime is unknown there: nobody said that it runs, nor that it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import UsageError, did_you_mean, escape

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp")
_EVERYWHERE = frozenset({
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe", "granitemoe", "granitemoehybrid", "ernie4_5_moe",
    "hunyuan_v1_moe", "lfm2_moe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "exaone_moe", "phimoe", "olmoe",
    "gpt_oss", "afmoe", "dbrx", "llama4_text",
})  # fmt: skip
_RUNS = {
    "vllm": _EVERYWHERE | {"dots1", "flex_olmo", "nemotron_h", "granitemoe_swa", "granitemoeshared", "hy_v3", "mellum",
                           "minimax_m2", "glm4_moe_lite", "mimo_v2_flash", "jamba", "llama4", "qwen3_vl_moe",
                           "qwen3_5_moe", "glm4v_moe", "aria", "internvl", "gemma4", "gemma4_text"},
    "sglang": _EVERYWHERE | {"dots1", "llama4", "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe"},
    "llama.cpp": _EVERYWHERE | {"dots1", "granitemoeshared", "nemotron_h", "hy_v3", "mellum", "minimax_m2",
                                "mimo_v2_flash", "jamba", "solar_open", "qwen3_5_moe_text", "laguna", "gemma4",
                                "gemma4_text", "glm4_moe_lite"},
}  # fmt: skip
_RUNS_NOT = {
    "vllm": frozenset[str](),
    "sglang": frozenset({"flex_olmo"}),
    "llama.cpp": frozenset({"flex_olmo", "granitemoe_swa", "aria_text"}),
}


def served(model_type: str, target: str) -> str:
    """ok, no or unknown. Every family of the tables runs in transformers."""
    if target == "transformers" or model_type in _RUNS[target]:
        return "ok"
    return "no" if model_type in _RUNS_NOT[target] else "unknown"


def check_served(model_type: str, targets: Sequence[str]) -> list[str]:
    """Warnings about runtimes that nobody proved for this family. Raises UsageError for one that is no runtime, or that
    does not know the family."""
    warnings = []
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--target {escape(target)}: unknown runtime", hint=did_you_mean(target, TARGETS))
        found = served(model_type, target)
        if found == "no":
            raise UsageError(
                f"--target {target} does not run {model_type}", hint="`moeconv families` lists the others."
            )
        if found == "unknown":
            warnings.append(f"nothing says that {target} runs {model_type}")
    return warnings
