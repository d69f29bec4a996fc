"""Baichuan: Baichuan and Baichuan 2 of 7B, whose class is code in their checkpoints."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, DENSE_FFN, FUSED_QKV, LAYER, dense_row
from moeconv.families.folds import unit_head
from moeconv.families.placement import Get
from moeconv.families.records import NUMBER, SWITCH, WHOLE, WORD, ConfigKeys, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

_SECOND = 125696  # the vocabulary of Baichuan 2; that of Baichuan has 64,000 tokens


def _positions(get: Get) -> str:
    """How positions enter: the 13B models, whose config.json has no max_position_embeddings, have no rotation."""
    return "alibi" if get("max_position_embeddings") is None else "rope"


# keys of tokenizers and training, and those that `positions` and `unit_head` have dealt with
BAICHUAN_OWN = dict.fromkeys(
    ("model_max_length", "z_loss_weight", "gradient_checkpointing", "positions", "normalised_head")
)
# Llama's block with queries, keys and values in one tensor
BAICHUAN = dense_row(
    "baichuan",
    "BaichuanForCausalLM",
    config=ConfigKeys(
        {
            "max_position_embeddings": None,
            **BAICHUAN_OWN,
        },
        kinds={
            "max_position_embeddings": WHOLE, "model_max_length": WHOLE, "z_loss_weight": NUMBER, "positions": WORD,
            "normalised_head": SWITCH, "gradient_checkpointing": SWITCH,
        },
        derived={"positions": _positions, "normalised_head": lambda get: get("vocab_size") == _SECOND},
        only={"positions": (("rope",), "its attention adds a bias that grows with the distance (ALiBi), as that of no "
                            "stock family with experts does")},
    ),
    tensors=Tensors(
        {key: name for key, name in BLOCK.items() if key not in FUSED_QKV["attention.qkv"]}
        | {"attention.qkv": LAYER + "self_attn.W_pack.weight"}
        | DENSE_FFN,
        fused=FUSED_QKV,
    ),
    runs_as=Pair("baichuan", "llama", rename=BAICHUAN_OWN, folds=(unit_head,)),
)  # fmt: skip

VENDOR = Vendor(dense=(BAICHUAN,))
