"""NAVER: HyperCLOVA X."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, LAYER, MULTIPLIERS, NO_BIAS, dense_row
from moeconv.families.records import NUMBER, ConfigKeys, Tensors
from moeconv.families.shapes import head_dim
from moeconv.families.vendor import Vendor

HYPERCLOVAX = dense_row(
    "hyperclovax",
    "HyperCLOVAXForCausalLM",
    config=ConfigKeys(
        {"head_dim": None, "attention_bias": False, "mlp_bias": False, "use_post_norm": True, **MULTIPLIERS}
        | {"attention_multiplier": None},
        neutral=NO_BIAS | {"use_post_norm": (False,)},
        kinds={"attention_multiplier": NUMBER},
        derived={"attention_multiplier": lambda get: head_dim(get) ** -0.5},
    ),
    tensors=Tensors(
        BLOCK
        | {f"norm.post{i}": LAYER + f"post_norm{i}.weight" for i in (1, 2)}
        | ATTENTION_BIAS
        | DENSE_FFN
        | FFN_BIAS,
        optional=frozenset({"norm.post1", "norm.post2"}),
    ),
)

VENDOR = Vendor(
    dense=(HYPERCLOVAX,),
)
