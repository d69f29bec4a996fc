"""The pairs of families read backwards: which dense family computes what a Mixture-of-Experts computes outside its
experts.

A pair states what the target needs, not what the source needs. Therefore the dense model that comes out is read
forwards again: if the pair makes of it the settings and the tensors of the Mixture-of-Experts, except those of its
experts and its router, the two compute the same outside the experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from moeconv.errors import InputError, escape
from moeconv.families import rope, sliding
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.registry import tables
from moeconv.families.spec import Family, Pair
from moeconv.families.target import CARRIED, TRAINING, draft_target
from moeconv.families.written import ALIASES
from moeconv.types import Config

_REPLACED = ("expert", "router", "shared")  # groups of tensors in whose place the new FFN is
# settings of routers and of their training that no record of a row names
_ROUTER = frozenset({
    "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_aux_loss_factor", "router_jitter_noise",
    "input_jitter_noise", "router_z_loss_coef", "moe_norm_min", "scoring_func", "topk_method", "use_expert_bias",
    "moe_normalize_expert_weights", "moe_jitter_eps", "moe_loss_weight", "num_nextn_predict_layers",
    "prefix_dense_intermediate_size", "intermediate_size",
})  # fmt: skip
_HINT = "See `moeconv families` for the pairs of families."


def dense_twins(family: Family, to: str | None) -> list[Pair]:
    """The pairs whose target is `family`, in the order in which they are tried: those that rewrite nothing first, and
    of these the dense families that become most others, which most programs can run.

    With `to`, only that of this dense family. Raises InputError, with the reason, if there is none.
    """
    if family.kind != "moe":
        raise InputError(f"{family.model_type} has no experts to collapse", hint="Give a Mixture-of-Experts model.")
    if family.multimodal.beside:
        raise InputError(
            f"{family.model_type} is a multimodal model, and only language models can be collapsed",
            hint=_HINT,
        )
    found = [pair for pair in tables().pairs if pair.target == family.model_type and pair.source in tables().dense]
    found = [pair for pair in found if not tables().dense[pair.source].runs_as]
    if not found:
        raise InputError(
            f"no dense family of transformers is known that computes what {family.model_type} computes outside its "
            "experts",
            hint=_HINT,
        )
    if to is not None:
        named = [pair for pair in found if to in (pair.source, tables().dense[pair.source].architecture)]
        if not named:
            can = ", ".join(pair.source for pair in found)
            raise InputError(f"--to {escape(to)}: {family.model_type} cannot become it", hint=f"It can become: {can}.")
        return named
    becomes = Counter(pair.source for pair in tables().pairs)
    return sorted(found, key=lambda p: (bool(p.folds), bool(p.rename), -becomes[p.source], not p.default))


def draft_dense(model: Model, pair: Pair) -> Draft:
    """The config (without the width of the FFN) and the expressions of the tensors outside the experts of a model as
    the dense family of `pair`; `ffn.` keys are those of its dense layers.

    Raises InputError for a setting that the dense family does not have.
    """
    target = tables().dense[pair.source]
    draft = draft_target(model, _reversed(model.family, pair, target), target)
    draft.tensors = {
        key: node
        for key, node in draft.tensors.items()
        if key.partition(".")[0] not in _REPLACED and not _without_effect(model, key, target)
    }
    draft.config = {key: value for key, value in draft.config.items() if key != "output_router_logits"}
    none = model.family.experts.placement.write((), model.num_layers, model.value) or {}
    draft.config |= {key: value for key, value in none.items() if key in target.config.defaults}
    for key in (old for old, new in pair.rename.items() if new is None):
        draft.config.pop(key, None)  # only the dense family has it, so that its default holds
    draft.config |= pair.backwards
    return draft


def _without_effect(model: Model, key: str, target: Family) -> bool:
    """Whether a tensor that the dense family lacks is zero in every layer, as `upcycle` writes it where only the family
    with experts has it. Reads its bytes."""
    if target.holds(key) is not None or model.family.tensors.inert.get(key) != 0.0:
        return False
    return all(model.checkpoint.is_zero(name) for name, role in model.roles.items() if role.key == key)


def check_twin(model: Model, pair: Pair, dense: Model) -> None:
    """Raises InputError unless `pair` makes of the model `dense` what `model` is outside its experts and its router."""
    family = model.family
    forwards = draft_target(dense, pair, family)
    plain = draft_target(dense, replace(pair, folds=()), family)
    for key, node in plain.tensors.items():
        if key not in forwards.tensors or forwards.tensors[key] != node:
            raise InputError(
                f"{pair.source} becomes {family.model_type} by a change of {key} that cannot be read backwards",
                hint=_HINT,
            )
    for key in sorted(set(family.config.defaults) - _ignored(family)):
        now, then = model.value(key), family.config.value(key, forwards.config)
        if key in ("head_dim", "num_key_value_heads") and now is None:
            continue  # derived, and the shapes of the tensors show it
        if key == "tie_word_embeddings" and model.own_head:
            now = False  # a head of its own on disk: the dense model is written untied
        if now != then:
            raise InputError(
                f"{family.model_type} with {escape(key)} = {escape(now)} has no exact equivalent in {pair.source}, "
                f"which computes as with {escape(then)}",
                hint=_HINT,
            )
    if _rotary(model.family, model.config) != _rotary(model.family, forwards.config):
        raise InputError(
            f"the rotary parameters of this {family.model_type} have no exact equivalent in {pair.source}", hint=_HINT
        )
    read = family.attention.sliding.read
    if read({**family.config.defaults, **forwards.config}, model.num_layers).layers != model.sliding.layers:
        raise InputError(
            f"the sliding windows of this {family.model_type} have no exact equivalent in {pair.source}", hint=_HINT
        )


def _rotary(family: Family, config: Config) -> object:
    given = {key: family.config.value(key, config) for key in rope.KEYS}
    given = {key: value for key, value in given.items() if value is not None}
    if family.attention.rope in ("none", "own", "per_layer", "per_type"):
        return given
    return rope.read_rope(given, theta=family.config.defaults["rope_theta"], partial=family.attention.partial)


def _reversed(family: Family, pair: Pair, target: Family) -> Pair:
    """The pair with its ends exchanged. Settings of the experts and the router are left out, and so are those that only
    the family with experts has; `check_twin` compares the latter."""
    rename: dict[str, str | None] = {new: old for old, new in pair.rename.items() if new is not None}
    others = {*family.elsewhere.keys, *_ignored(family), *(name for names in ALIASES for name in names)} - CARRIED
    for key in {*family.config.defaults, *others} - set(rename) - set(target.config.defaults) - set(rope.KEYS):
        rename[key] = None
    return Pair(family.model_type, target.model_type, rename=rename)


def _ignored(family: Family) -> set[str]:
    """The config keys of experts, routers, training and of what `check_twin` compares in another way."""
    experts, rules = family.experts, [family.experts.routing]
    rules += list(experts.rules[1].values()) if experts.rules else []
    names: list[str | None] = [*experts.count, *experts.top_k, experts.width, experts.dense_width, experts.factor]
    names += [*experts.shared_width, experts.averaged[0] if experts.averaged else None]
    names.append(experts.rules[0] if experts.rules else None)
    for rule in rules:
        if rule is not None:
            names += [rule.renormalise, rule.scaling, *(rule.groups or ()), (rule.grouped_by or (None,))[0]]
    found = {name for name in names if name} | _ROUTER | TRAINING | CARRIED | set(rope.KEYS) | set(sliding.KEYS)
    return found | set(experts.placement.keys)
