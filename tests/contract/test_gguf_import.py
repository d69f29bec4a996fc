"""Every family that GGUF is written for, exported in float32 and imported: the same logits, or a stated refusal."""

from __future__ import annotations

import pytest
import torch
from contract.gguf_cases import CASES, make
from contract.stock import load, logits

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.errors import Unsupported
from moeconv.families.model import open_model
from moeconv.importing.planner import ORIGIN, plan_import
from moeconv.options import ImportOptions
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize

pytest.importorskip("gguf")
_PER_LAYER = "a value for each layer"
_NO_NORM = "layer_norm_rms_epsilon, which an import needs"
_PACKED = "it has no separate tensor for"
_LATENT = "blk.0.attn_k_b.weight"
_OFFSET = "cannot reverse how llama.cpp stores norm.attention"
# case without " experts" -> a part of the reason
REFUSED = {
    **dict.fromkeys(("bamba", "granitemoehybrid", "granitemoehybrid-nope", "lfm2", "lfm2_moe", "jamba"), _PER_LAYER),
    **dict.fromkeys(("nemotron_h", "nemotron_h-latent", "gemma4", "gemma4-vision", "gemma4_text-k-eq-v"), _PER_LAYER),
    **dict.fromkeys(("cohere", "cohere2", "dbrx", "nemotron", "olmo", "olmo-clip", "stablelm"), _NO_NORM),
    **dict.fromkeys(("gpt_oss", "gpt_oss-yarn", "granitemoe", "granitemoe_swa", "granitemoeshared"), _PACKED),
    **dict.fromkeys(("llama4", "llama4-step", "gemma4_text"), _PACKED),
    **dict.fromkeys(("deepseek_v2", "deepseek_v2-yarn", "deepseek_v3", "deepseek_v3-yarn"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "youtu"), _LATENT),
    **dict.fromkeys(("gemma", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe-vision", "qwen3_next"), _OFFSET),
    **dict.fromkeys(("glm", "glm-no-bias", "phi3-partial", "minimax_m2-partial"), "rope.dimension_count is 8"),
    **dict.fromkeys(
        ("granite_swa", "olmo3-sliding", "exaone_moe", "exaone_moe-mixed", "afmoe"), "attention.sliding_window"
    ),
    **dict.fromkeys(("cohere2_moe", "cohere2_moe-softmax"), "mlp.gate.weight"),
    "ernie4_5_moe": "cannot reverse how llama.cpp stores router.correction_row",
    "phi3-longrope": "rope_factors_long.weight",
    "llama-llama3": "rope_freqs.weight are not those of a published scaling",
}  # fmt: skip
_FEW = ("llama-llama3", "olmo3-sliding", "glm4_moe experts", "gpt_oss experts", "qwen3_moe experts")


@pytest.mark.parametrize(
    "case", [case if case in _FEW else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_an_import_computes_the_same_or_is_refused(tmp_path, case):
    source = make(tmp_path / "source", case)
    model = open_model(source)
    execute(plan_quantize(model, format="gguf", scheme="f32"), source=model.checkpoint, out=tmp_path / "gguf")
    file = GgufSource(tmp_path / "gguf" / "model.gguf")
    reason = REFUSED.get(case.removesuffix(" experts"))
    if reason is not None:
        with pytest.raises(Unsupported) as refused:
            plan_import(file, ImportOptions(dtype="float32"))
        assert reason in refused.value.message
        assert refused.value.hint.startswith("Use the original model")
        return
    plan, _ = plan_import(file, ImportOptions(dtype="float32"))
    execute(plan, source=model.checkpoint, out=tmp_path / "back", origins={ORIGIN: file})
    torch.testing.assert_close(logits(load(tmp_path / "back")), logits(load(source)), rtol=1e-6, atol=1e-6)
