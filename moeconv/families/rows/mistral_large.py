"""Mistral AI: Mistral Large 4, as its files name the tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeconv.families import placement
from moeconv.families.blocks import INDEXER_CONFIG, LAYER, MLA_CONFIG
from moeconv.families.expert_blocks import GROUPED, SIGMOID, W_NAMES, moe_row
from moeconv.families.indexers import indexer_types
from moeconv.families.per_layer import one_per_layer
from moeconv.families.placement import Get
from moeconv.families.records import LIST, NUMBER, Attention, ConfigKeys, Experts, Layers, Tensors
from moeconv.families.rope import rotating
from moeconv.families.shapes import LATENT, Place
from moeconv.families.vendor import Vendor, Wrapper

# which layers compute keys and values of their own, and which choose the tokens that they read
_ALONE, _LISTENS, _BORROWS, _BOTH = (
    "indexed_attention", "indexed_attention with the tokens of an earlier layer",
    "indexed_attention with the keys of an earlier layer",
    "indexed_attention with the tokens and keys of an earlier layer",
)  # fmt: skip


def _kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer. Raises InputError for a list of sources of another length."""
    sources = get("kv_source_layers")
    if sources is None:
        sources = list(range(layers))
    sources = one_per_layer(sources, layers, "kv_source_layers", noun="number")
    own = {(True, "full"): _ALONE, (True, "shared"): _LISTENS, (False, "full"): _BORROWS, (False, "shared"): _BOTH}
    return [own[source == i, word] for i, (source, word) in enumerate(zip(sources, indexer_types(get, layers)))]


def _rope(get: Get, place: Place) -> Any:
    """The rows of a head that rotate: none in a layer without rotary embeddings."""
    turns = place.layer is None or rotating(get, get("num_hidden_layers"))[place.layer]
    return get("qk_rope_head_dim") if turns else 0


def _still(get: Get, place: Place) -> Any:
    return get("qk_nope_head_dim") + get("qk_rope_head_dim") - _rope(get, place)


_ATTENTION, _INDEXER = LAYER + "attention.", LAYER + "attention.indexer."
_TENSORS = {
    "embedding.tokens": "model.tok_embeddings.weight",
    "embedding.lm_head": "lm_head.weight",
    "norm.final": "model.norm.weight",
    "rotary.alpha": "model.lerope.alpha",
    "norm.attention": LAYER + "attention_norm.weight",
    "norm.ffn": LAYER + "ffn_norm.weight",
    "attention.q_whole": _ATTENTION + "wq.weight",
    "attention.kv_a": _ATTENTION + "wkv_a_with_mqa.weight",
    "attention.kv_a_norm": _ATTENTION + "kv_a_norm.weight",
    "attention.kv_b": _ATTENTION + "wkv_b.weight",
    "attention.o": _ATTENTION + "wo.weight",
    "attention.log_scale": _ATTENTION + "ssmax_scaling.s",
    "attention.log_bias": _ATTENTION + "ssmax_scaling.b",
    "indexer.q": _INDEXER + "wq_b.weight",
    "indexer.q_norm": _INDEXER + "q_input_norm.weight",
    "indexer.q_norm_bias": _INDEXER + "q_input_norm.bias",
    "indexer.k": _INDEXER + "wk.weight",
    "indexer.k_norm": _INDEXER + "k_norm.weight",
    "indexer.k_norm_bias": _INDEXER + "k_norm.bias",
    "indexer.weights": _INDEXER + "weights_proj.weight",
    "indexer.log_scale": _INDEXER + "ssmax_scaling.s",
    "indexer.log_bias": _INDEXER + "ssmax_scaling.b",
    "router.weight": LAYER + "gate.weight",
    **{f"expert.{part}": LAYER + "experts.{E}." + f"{name}.weight" for part, name in W_NAMES.items()},
    **{f"shared.{part}": f"{LAYER}shared_experts.{name}.weight" for part, name in W_NAMES.items()},
    **{f"ffn.{part}": f"{LAYER}feed_forward.{name}.weight" for part, name in W_NAMES.items()},
}
_OWN_KEYS = frozenset({_ALONE, _LISTENS})
MISTRAL_LARGE4 = moe_row(
    "mistral_large4_text",
    "MistralLarge4ForConditionalGeneration",
    config=ConfigKeys(
        {k: v for k, v in (MLA_CONFIG | INDEXER_CONFIG | SIGMOID).items() if k not in ("q_lora_rank", "norm_topk_prob")}
        | {
            "num_key_value_heads": 64,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-5,
            "qk_nope_head_dim": 64,
            "moe_intermediate_size": 6144,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            "layer_types": None,
            "index_n_heads": 32,
            "indexer_types": None,
            "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "kv_source_layers": None,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2048.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
        },
        kinds={"indexer_types": LIST, "kv_source_layers": LIST, "final_logit_softcapping": NUMBER},
    ),
    tensors=Tensors(
        _TENSORS,
        float32=frozenset({"rotary.alpha"}),
        shapes=LATENT
        | {
            "rotary.alpha": "pairs", "indexer.q": "index_heads*index_head, hidden", "indexer.q_norm": "hidden",
            "indexer.q_norm_bias": "hidden",
            **{f"attention.{key}": "heads" for key in ("log_scale", "log_bias")},
            **{f"indexer.{key}": "index_heads" for key in ("log_scale", "log_bias")},
        },
        sizes={"rope": _rope, "nope": _still, "pairs": lambda get, _place: get("qk_rope_head_dim") // 2},
    ),
    attention=Attention(rope="no_rope"),
    layers=Layers(
        kinds=_kinds,
        where={
            "indexer": frozenset({_ALONE, _BORROWS}), "attention.kv_a": _OWN_KEYS, "attention.kv_a_norm": _OWN_KEYS,
        },
        passed_on=("tokens or keys", frozenset({_LISTENS, _BORROWS, _BOTH})),
    ),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.WORDS_OR_FIRST_K,
        routing=replace(GROUPED, score="softmax", renormalise="always"),
    ),
)  # fmt: skip
_OUTSIDE = ("vision_encoder.", "pre_mm_projector_norm.", "patch_merger.", "vision_language_adapter.")

VENDOR = Vendor(
    wrappers=(
        Wrapper(
            "mistral_large4",
            "MistralLarge4ForConditionalGeneration",
            (MISTRAL_LARGE4,),
            dict.fromkeys(_OUTSIDE, "vision"),
            prefix="",
            head="output.",
            in_memory={
                "^layers.": "model.language_model.layers.",
                "^output": "lm_head",
                "^vision_encoder.": "model.vision_tower.",
                "^patch_merger.": "model.multi_modal_projector.patch_merger.",
                "^vision_language_adapter.w_in": "model.multi_modal_projector.linear_1",
                "^vision_language_adapter.w_out": "model.multi_modal_projector.linear_2",
                # the tower has the latter names
                ".attention.": (".self_attn.", ".attention."),
                ".feed_forward.": (".mlp.", ".feed_forward."),
                ".gate": ".mlp.gate",
                ".shared_experts.": ".mlp.shared_experts.",
                ".wkv_a_with_mqa": ".kv_a_proj_with_mqa",
                ".wkv_b": ".kv_b_proj",
                ".self_attn.wq": ".self_attn.q_proj",
                ".attention.wq": ".attention.q_proj",
                ".attention.wk": ".attention.k_proj",
                ".wv": ".v_proj",
                ".wo": ".o_proj",
                ".w1": ".gate_proj",
                ".w2": ".down_proj",
                ".w3": ".up_proj",
            },
        ),
    ),
)
