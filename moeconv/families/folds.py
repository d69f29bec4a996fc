"""Rules that rewrite a source's tensors and config where the target has no setting for what the source computes.

A rule edits a Draft: the expression that computes the tensor of each key, and the config of the result. In exact
arithmetic, no rule changes the function that the model computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moeconv.errors import InputError
from moeconv.families import rope
from moeconv.families.node import Node, add, centre, fill, rotary, scale, scale_rows, source, unit_rows
from moeconv.families.placement import Get
from moeconv.families.shapes import head_dim
from moeconv.families.spec import Family
from moeconv.types import JsonObject

_RESIDUAL = ("attention.o", "attention.o_bias", "ffn.down", "ffn.down_bias")  # what writes the residual stream
_QUERY = ("attention.q", "attention.q_bias")
_TURNED = (*_QUERY, "attention.k", "attention.k_bias")


@dataclass
class Draft:
    """A conversion while it is being planned.

    `get` reads a value of the source's config, defaults included. `tensors` maps a key to the expression that computes
    its tensor in every layer that has the key. `tied` is true if the source's output head is its token embedding.
    """

    source: Family
    target: Family
    get: Get
    layers: int
    config: JsonObject
    tensors: dict[str, Node]
    warnings: list[str]
    tied: bool

    def change(self, keys: Iterable[str], how: Callable[[Node], Node]) -> None:
        """Wrap the expression of each key in `how`; keys that the draft does not have are skipped."""
        for key in keys:
            if key in self.tensors:
                self.tensors[key] = how(self.tensors[key])

    def scale(self, keys: Iterable[str], by: float) -> None:
        self.change(keys, lambda node: scale(node, by))

    def norms(self) -> list[str]:
        return [key for key in self.tensors if key.startswith("norm.") and not key.endswith("_bias")]


Fold = Callable[[Draft], None]  # a rule that the row of a pair lists


# -- what follows from the two families' rows ----------------------------------------------------------------------


def align_layout(draft: Draft) -> None:
    """Adapt the norm weights' offset, the rotary order and the rotary parameters to the target's row.

    Raises InputError if rows of the heads must be reordered and the source normalises queries and keys: the weights of
    those norms would have to be reordered too, which no rule does.
    """
    offset = draft.source.tensors.norm_offset - draft.target.tensors.norm_offset
    draft.change(draft.norms(), lambda node: add(node, offset))
    params = _rope(draft)
    head = _head(draft)
    size = int(head * params.get("partial_rotary_factor", 1.0))
    spreads = size < head and draft.target.attention.partial is None
    if draft.source.attention.rotary != draft.target.attention.rotary or spreads:
        if any(key.startswith("attention.") and "_norm" in key for key in draft.tensors):
            raise InputError(
                f"{draft.source.model_type} normalises queries and keys, whose rotary order {draft.target.model_type} "
                "does not share",
                hint="See `moeconv families` for other targets (--to).",
            )
        if draft.source.attention.rotary != draft.target.attention.rotary:
            _turn(draft, head, size, draft.target.attention.rotary)
        if spreads:
            # the target multiplies the dimensions that do not rotate by the attention factor too; the source does not
            factor = rope.attention_factor(params, draft.get("max_position_embeddings"))
            draft.change(_TURNED, lambda node: scale_rows(node, 1 / factor, head=head, start=size, stop=head))
            _turn(draft, head, size, "spread")
    _align_rope(draft, params, head=head, size=size, spreads=spreads)


def _head(draft: Draft) -> int:
    return draft.get("qk_rope_head_dim") or head_dim(draft.get)


def _turn(draft: Draft, head: int, size: int, order: str) -> None:
    draft.change(_TURNED, lambda node: rotary(node, head=head, start=0, size=size, order=order))


def _rope(draft: Draft) -> JsonObject:
    family = draft.source
    config = {key: draft.get(key) for key in rope.KEYS}
    config = {key: value for key, value in config.items() if value is not None}
    return rope.read_rope(config, theta=family.config.defaults["rope_theta"], partial=family.attention.partial)


def _align_rope(draft: Draft, params: JsonObject, *, head: int, size: int, spreads: bool) -> None:
    """Write the rotary parameters in the target's style.

    Parameters that config.json leaves to the source's class are written too, since the target's class may assume other
    values.
    """
    family, target = draft.source, draft.target
    if family.attention.rope == target.attention.rope == "none":
        return
    if family.attention.rope == target.attention.rope == "own":
        draft.config.setdefault("rope_parameters", copy.deepcopy(family.config.defaults["rope_parameters"]))
        return
    if family.attention.rope == target.attention.rope == "per_layer":
        draft.config |= rope.both_wordings(params)
        return
    if not target.attention.sections:
        params = {key: value for key, value in params.items() if key not in rope.SECTIONS}
    longest = draft.get("max_position_embeddings")
    if spreads:
        params = rope.spread(params, head=head, size=size, longest=longest)
    elif target.attention.partial is None:
        params.pop("partial_rotary_factor", None)
    else:
        params.setdefault("partial_rotary_factor", 1.0)
    rotates = [True] * draft.layers
    if family.attention.rope == "no_rope":
        rotates = rope.rotating(draft.get, draft.layers)
    if family.attention.rope == "per_type" and target.attention.rope != "per_type":
        sliding = family.attention.sliding.read({**family.config.defaults, **_given(draft)}, draft.layers).layers
        rope.check_uniform(_given(draft), sliding, name=family.model_type)
    for key in rope.KEYS:
        draft.config.pop(key, None)
    draft.config |= rope.write_rope(params, style=target.attention.rope, rotates=rotates)


def _given(draft: Draft) -> JsonObject:
    words = ("rope_parameters", "sliding_window", "layer_types", "sliding_window_pattern")
    return {key: draft.get(key) for key in words if draft.get(key) is not None}


# -- rules that the row of a pair lists ----------------------------------------------------------------------------


def embedding_root(draft: Draft) -> None:
    """Fold in the factor sqrt(hidden_size) by which Gemma multiplies its embeddings."""
    _embedding(draft, math.sqrt(draft.get("hidden_size")))


def _embedding(draft: Draft, by: float) -> None:
    """Scale the embeddings. If the head is tied to them, divide the final norm by the same factor to keep logits."""
    draft.scale(["embedding.tokens"], by)
    if draft.tied:
        draft.scale(["norm.final"], 1 / by)


def granite_multipliers(draft: Draft) -> None:
    """Fold Granite's four multipliers (muP) into the weights whose outputs they multiply."""
    get = draft.get
    _embedding(draft, get("embedding_multiplier"))
    draft.scale(["norm.final"], 1 / get("logits_scaling"))
    draft.scale(_RESIDUAL, get("residual_multiplier"))
    draft.scale(_QUERY, get("attention_multiplier") * math.sqrt(head_dim(get)))


def minicpm_multipliers(draft: Draft) -> None:
    """Fold MiniCPM's scale_emb, scale_depth and dim_model_base into the weights whose outputs they multiply."""
    get = draft.get
    _embedding(draft, get("scale_emb"))
    draft.scale(["norm.final"], get("dim_model_base") / get("hidden_size"))
    draft.scale(_RESIDUAL, get("scale_depth") / math.sqrt(draft.layers))


def minicpm_as_multipliers(draft: Draft) -> None:
    """Write MiniCPM's scale_emb, scale_depth and dim_model_base as the multipliers of Granite."""
    get = draft.get
    draft.config |= {
        "embedding_multiplier": float(get("scale_emb")),
        "logits_scaling": get("hidden_size") / get("dim_model_base"),
        "residual_multiplier": get("scale_depth") / math.sqrt(draft.layers),
        "attention_multiplier": head_dim(get) ** -0.5,
    }


def unit_head(draft: Draft) -> None:
    """Divide the rows of the output head by their lengths, as Baichuan 2 does whenever it runs."""
    if draft.get("normalised_head"):
        untied_head(draft)
        draft.change(["embedding.lm_head"], unit_rows)


def neutral_multipliers(draft: Draft) -> None:
    """Set Granite's multipliers to the values at which it computes as a family without multipliers."""
    ones = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    draft.config |= ones | {"attention_multiplier": head_dim(draft.get) ** -0.5}


def logits_times(draft: Draft) -> None:
    """Invert logits_scaling: HyperCLOVA X multiplies the logits by it, Granite divides them by it."""
    draft.config["logits_scaling"] = 1 / draft.get("logits_scaling")


def pairs_to_interleaved_mla(draft: Draft) -> None:
    """Reorder the rotary rows of multi-head latent attention as DeepSeek does: serving engines assume that order."""
    get = draft.get
    nope, turns, rank = get("qk_nope_head_dim"), get("qk_rope_head_dim"), get("kv_lora_rank")
    order = "interleaved"
    draft.change(["attention.q_b"], lambda node: rotary(node, head=nope + turns, start=nope, size=turns, order=order))
    draft.change(["attention.kv_a"], lambda node: rotary(node, head=rank + turns, start=rank, size=turns, order=order))
    draft.config["rope_interleave"] = True


def squared_relu(draft: Draft) -> None:
    """Turn an ungated FFN with relu(x)^2 = relu(x) * x into a gated FFN whose gate is its up projection."""
    _need_activation(draft, "relu2")
    draft.tensors["ffn.gate"] = draft.tensors["ffn.up"]
    draft.config["hidden_act"] = "relu"


def _need_activation(draft: Draft, *words: str) -> None:
    if draft.get("hidden_act") not in words:
        raise InputError(
            f"{draft.source.model_type} with hidden_act = {draft.get('hidden_act')} has no exact equivalent in "
            f"{draft.target.model_type}; only hidden_act = {' or '.join(words)} has one",
            hint="See `moeconv families` for other targets (--to).",
        )


def only_silu(draft: Draft) -> None:
    """Raise InputError unless the source computes SiLU: the target's experts do, whatever config.json contains."""
    if draft.source.config.defaults.get("hidden_act"):
        _need_activation(draft, "silu", "swish")


def legacy_gelu(draft: Draft) -> None:
    """Write the activation that Gemma's class computes: it reads "gelu" as the tanh approximation.

    hidden_activation takes precedence where it is set.
    """
    if draft.get("hidden_act") == "gelu":
        draft.config["hidden_act"] = "gelu_pytorch_tanh"
    draft.config.pop("hidden_activation", None)


def centred_residual(draft: Draft) -> None:
    """Replace LayerNorm without weights by RMSNorm.

    The two are equal once everything that is added to the residual stream has mean 0 over the hidden dimension.
    """
    untied_head(draft)
    draft.change(["embedding.tokens"], lambda node: centre(node, 1))
    draft.change(["attention.o", "ffn.down"], lambda node: centre(node, 0))
    unit_norms(draft)
    draft.config["rms_norm_eps"] = 1e-5  # the constant in the code of OlmoLayerNorm


def untied_head(draft: Draft) -> None:
    """Store the output head as a tensor of its own, if it was tied to the embedding."""
    if draft.tied:
        draft.tensors["embedding.lm_head"] = source("embedding.tokens")
        draft.config["tie_word_embeddings"] = False
        draft.tied = False


def unit_norms(draft: Draft) -> None:
    """Give norms without weights a weight of 1."""
    for key in ("norm.attention", "norm.ffn", "norm.final"):
        draft.tensors[key] = fill(1.0)


def dbrx_words(draft: Draft) -> None:
    """Write the rotary base in the two places that readers of DBRX use, and a clip of queries, keys and values.

    DBRX cannot compute without a clip, so it gets one that no value reaches.
    """
    draft.config["rope_parameters"] = params = _rope(draft)
    draft.config["rope_theta"] = params["rope_theta"]
    draft.config.pop("rope_scaling", None)  # if present, the class looks for the base beside it, where DBRX has none
    if params["rope_type"] != "default":
        draft.warnings.append(
            f"rotary embeddings of type {params['rope_type']} are read by transformers 5 alone: transformers 4, vLLM, "
            "SGLang and llama.cpp compute dbrx without scaling, so the result is right in transformers 5 only"
        )
    if draft.get("clip_qkv") is None:
        draft.config["clip_qkv"] = 1e30


def second_branch(draft: Draft) -> None:
    """Give the norms of a layer with a dense branch beside its experts the weights of the FFN's norm.

    The dense branch, the experts and the router each have a norm of their own in front. The class also multiplies the
    router's input by hidden_size^-1/2, so the weights of the router's norm are multiplied by the power of two nearest
    to hidden_size^1/2, which changes no bit of their mantissas.
    """
    draft.tensors["norm.shared"] = source("norm.ffn")
    draft.tensors["norm.router"] = scale(source("norm.ffn"), 2.0 ** round(math.log2(draft.get("hidden_size")) / 2))


def all_layers_slide(draft: Draft) -> None:
    """Let every layer slide, with a window as long as the context: the target rotates in sliding layers only."""
    draft.config |= {
        "sliding_window": draft.get("max_position_embeddings"),
        "layer_types": ["sliding_attention"] * draft.layers,
    }


def expert_biases(draft: Draft) -> None:
    """Add biases, and subtract 1 from that of the up projection.

    GPT-OSS computes (up + 1) * gate * sigmoid(alpha * gate), which is SwiGLU with alpha = 1 and such a bias.
    """
    _need_activation(draft, "silu", "swish")
    for part in ("gate", "up", "down"):
        draft.tensors.setdefault(f"ffn.{part}_bias", fill(0.0))
    draft.change(["ffn.up_bias"], lambda node: fill(-1.0) if node.op == "fill" else add(node, -1.0))


def below_long_context(draft: Draft) -> None:
    """Warn that Ministral 3 scales queries beyond its original context length, which no target does."""
    length = _rope(draft).get("original_max_position_embeddings")
    if length is not None:
        draft.warnings.append(
            f"exact only up to {length} tokens (original_max_position_embeddings): beyond, the source scales its "
            "queries (llama_4_scaling_beta), which the target cannot"
        )
        params = draft.config.get("rope_parameters")
        if isinstance(params, dict):
            params.pop("llama_4_scaling_beta", None)


def attention_kinds(draft: Draft) -> None:
    """Use attention in every layer of a target that can mix kinds of layers."""
    get = draft.get
    draft.config |= {"layer_types": ["full_attention"] * draft.layers, "position_embedding_type": "rope"}
    # no layer has a state-space block, but the class checks that the sizes of one would match the hidden size
    fits = {"mamba_n_heads": 2 * get("num_attention_heads"), "mamba_expand": 2}
    draft.config |= fits | {"mamba_d_head": get("hidden_size") // get("num_attention_heads")}
