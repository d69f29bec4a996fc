"""Which families does vLLM run, plain and packed in INT4? Random models of each, pruned by moeconv, as a table.

    MOECONV_VLLM_PYTHON=... python tests/runtimes/served.py [--plain] [FAMILY ...]

What it prints is what families/served.py and quantize/targets.py say of vLLM. Agreement as in agreement.py: the share
of greedy tokens that are the choice of transformers too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agreement as runtimes

from moeconv.errors import InputError, UsageError
from moeconv.plan.meter import SilentMeter
from moeconv.recipe.run import run_step

# the sizes that vLLM's latent attention has a kernel for
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128}  # fmt: skip
_HEAD = {"head_dim": 32}
_SIGMOID = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = runtimes.LLAMA_CPP_FAMILIES | {
    "deepseek_v3": {**_SIGMOID, **_MLA, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_SIGMOID, **_MLA},
    "deepseek_v2": {**_MLA, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**_HEAD, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "minimax_m2": {**_HEAD, "num_local_experts": 8},
    "hy_v3": {**_HEAD, "num_experts": 8},
    "exaone_moe": {**_HEAD, "num_experts": 8, "n_group": 1, "topk_group": 1, "sliding_window": 64},
    "afmoe": {**_HEAD, "num_experts": 8, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 64},
    "granitemoe": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8, "attention_bias": True},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "cohere2_moe": {**_HEAD, "num_experts": 8, "tie_word_embeddings": True, "expert_selection_fn": "sigmoid"},
    "flex_olmo": {"num_experts": 8, "norm_topk_prob": True},
    "hunyuan_v1_moe": {**_HEAD, "num_experts": 8, "moe_topk": 2},
    "mellum": {**_HEAD, "num_experts": 8, "sliding_window": 64},
}


def measure(family: str, work: Path, *, packed_too: bool) -> Iterator[tuple[str, str]]:
    """(what was run, share of greedy tokens that agree or the runtime's last words)."""
    made, source = work / "made", work / "source"
    runtimes.LLAMA_CPP_FAMILIES[family] = FAMILIES[family]
    runtimes.random_model(family, made)
    run_step("prune", {"keep": 6, "criterion": "random"}, str(made), str(source), meter=SilentMeter())
    asked = runtimes.prompts(source)
    for name, parameters in (("bf16", None), ("int4 g32", {"group_size": "32"}))[: 1 + packed_too]:
        packed, plain = (source, source) if parameters is None else (work / "packed", work / "plain")
        try:
            if parameters is not None:
                runtimes.quantize(source, packed, parameters)
                runtimes.dequantized(source, packed, plain, parameters)
            yield name, f"{100 * runtimes.agreement('vllm', packed, plain, asked)['agreement']:.1f} %"
        except (InputError, UsageError) as error:
            yield name, f"not written: {error.message[:90]}"
        except RuntimeError as error:
            yield name, f"refused: {str(error)[-160:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--plain", action="store_true", help="bfloat16 alone")
    options = parser.parse_args()
    print("| family | weights | greedy tokens that agree |\n|---|---|---|")
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            for name, found in measure(family, Path(folder), packed_too=not options.plain):
                print(f"| {family} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main()
