"""How mlx-lm names the experts of the families that it runs: stacked, with one tensor per projection.

From the classes of mlx-lm 0.32.2, whose `sanitize` functions read the hub's names of all other tensors. One row per
family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeconv.families.records import ExpertLayout, Packed
from moeconv.families.spec import Family

READER = "mlx-lm"
_PARTS: Mapping[str, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True, slots=True)
class Switch:
    """The experts of a family in mlx-lm.

    `module` is the module below a layer that has the stacked projections, and `parts` has their names in it; with {E}
    in `module`, every expert has a module of its own. `refused` is the reason why mlx-lm cannot read codes of the
    family under the hub's names; `floats` are the keys of other matrices that it reads only as floats.
    """

    module: str = "mlp.switch_mlp"
    parts: Mapping[str, str] = field(default_factory=lambda: _PARTS)
    refused: str = ""
    floats: frozenset[str] = frozenset()


_MLP = Switch()
_SPARSE = Switch("block_sparse_moe.switch_mlp")
_EXPERTS = Switch("mlp.experts")

SWITCH: Mapping[str, Switch] = {
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen3_moe", "olmoe", "mellum", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v2",
            "deepseek_v3", "deepseek_v32", "solar_open", "exaone_moe", "laguna", "ernie4_5_moe", "mimo_v2_flash",
            "kimi_linear", "kimi_k25", "qwen3_5_moe", "qwen3_vl_moe",
        ),
        _MLP,
    ),
    **dict.fromkeys(("mixtral", "minimax_m2", "phimoe", "granitemoe", "granitemoehybrid", "minimax_m3_vl"), _SPARSE),
    **dict.fromkeys(("afmoe", "dots1", "gpt_oss"), _EXPERTS),
    "jamba": Switch("feed_forward.switch_mlp"),
    # it renames the weights of dense layers, but not their scales
    "lfm2_moe": Switch("feed_forward.switch_mlp", floats=frozenset({"ffn.gate", "ffn.up", "ffn.down"})),
    **dict.fromkeys(("gemma4_text", "gemma4"), Switch("experts.switch_glu")),
    "nemotron_h": Switch("mixer.switch_mlp", {"up": "fc1", "down": "fc2"}),
    "qwen3_next": Switch(
        refused="mlx-lm adds 1 to its norms only where it stacks the experts itself, so that the norms of a checkpoint "
        "with stacked codes would have to be changed too"
    ),
    "dbrx": Switch(
        refused="mlx-lm splits its expert tensors itself, which works only for floats"
    ),
    "llama4": Switch("feed_forward.experts"),
}  # fmt: skip


def switch_form(family: Family) -> Family | None:
    """The row with the experts as mlx-lm stacks them; None for a family whose codes it cannot read."""
    row = SWITCH.get(family.model_type)
    if row is None or row.refused or family.kind != "moe":
        return None
    names: dict[str, str] = {}
    packed: dict[str, Packed] = {}
    start = f"{family.tensors.prefix}layers.{{L}}.{row.module}."
    for part in _matrices(family):
        stem, bias, _ = part.partition("_bias")
        key = f"expert.{part}"
        names[key] = start + row.parts[stem] + (".bias" if bias else ".weight")
        packed[key] = Packed((part,))
    return family.with_experts(ExpertLayout(names, packed, READER))


def floats_only(family: Family) -> frozenset[str]:
    """Keys of matrices of a family that mlx-lm reads only as floats."""
    row = SWITCH.get(family.model_type)
    # it splits the joined up projections of keys and values when it loads a model, and would quantize the parts again
    return frozenset({"attention.kv_b"}) | (row.floats if row else frozenset())


def _matrices(family: Family) -> list[str]:
    """What an expert of the family consists of: gate, up, down, and their biases."""
    keys = [key for key in family.tensors.names if key.startswith("expert.")]
    layouts = [family.tensors.packed.get(key) for key in keys]
    parts = [way.parts if way else (key.removeprefix("expert."),) for key, way in zip(keys, layouts, strict=True)]
    return [part for several in parts for part in several]


def why_not(family: Family) -> str:
    """Why there is no such row."""
    row = SWITCH.get(family.model_type)
    return row.refused if row and row.refused else f"mlx-lm does not run {family.model_type}"
