"""Alibaba: Qwen3-Next and Qwen3.5, with linear attention (gated delta rule)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.changes import plus_one, without_middle_axis
from moeconv.quantize.gguf.llama_cpp.expression import Expression, join
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.record import Change, LlamaCpp, Number
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

_NAMES = layer(
    {
        "norm.ffn": "post_attention_norm.weight", "linear.A": "ssm_a", "linear.dt": "ssm_dt.bias",
        "linear.conv": "ssm_conv1d.weight", "linear.norm": "ssm_norm.weight", "linear.out": "ssm_out.weight",
        "linear.ba": "ssm_ba.weight", "linear.a": "ssm_alpha.weight", "linear.b": "ssm_beta.weight",
        "linear.qkv": "attn_qkv.weight", "linear.z": "attn_gate.weight",
    }
)  # fmt: skip


def _sizes(get: Get) -> tuple[int, int, int, int]:
    """(heads of keys, heads of values per head of keys, width of a head of keys, of values)."""
    keys = get("linear_num_key_heads")
    return keys, get("linear_num_value_heads") // keys, get("linear_key_head_dim"), get("linear_value_head_dim")


def _decay(_get: Get, part: Expression) -> Mapping[str, Expression]:
    return {"": part.negative_exp()}


def _by_kind(get: Get, part: Expression) -> Mapping[str, Expression]:
    """Rows in the order of the heads of keys, each with its queries, keys, values and gates, become all queries, all
    keys and all values; and all gates."""
    keys, each, key, value = _sizes(get)
    sizes = (key, key, each * value, each * value)
    pieces = part.reshape(keys, sum(sizes), part.shape[-1]).split(1, sizes)
    q, k, v, gates = (piece.reshape(-1, part.shape[-1]) for piece in pieces)
    return {"blk.{L}.attn_qkv.weight": join(0, (q, k, v)), "blk.{L}.attn_gate.weight": gates}


def _tiled(part: Expression, get: Get, *, axis: int, width: int) -> Expression:
    """Heads of values of one head of keys are adjacent; they become one round of the heads of keys after the other."""
    keys, each, _, _ = _sizes(get)
    shape = part.shape
    apart = part.reshape(*shape[:axis], keys, each, width, *shape[axis + 1 :])
    axes = list(range(len(apart.shape)))
    axes[axis], axes[axis + 1] = axis + 1, axis
    return apart.permute(*axes).reshape(*shape)


def _values(axis: int, width: Callable[[Get], int]) -> Change:
    return lambda get, part: {"": _tiled(part, get, axis=axis, width=width(get))}


def _behind_keys(get: Get, part: Expression) -> Mapping[str, Expression]:
    """The same for values behind queries and keys."""
    keys, _, key, value = _sizes(get)
    plain = part.reshape(part.shape[0], part.shape[-1])
    before = 2 * keys * key
    first, values = plain.split(0, (before, part.shape[0] - before))
    return {"": join(0, (first, _tiled(values, get, axis=0, width=value)))}


def _one(_get: Get) -> int:
    return 1


def _head(get: Get) -> int:
    width: int = get("linear_value_head_dim")
    return width


def _recurrent(model: Model) -> list[bool]:
    return [kind == "linear_attention" for kind in model.layer_kinds or ()]


def _interval(model: Model) -> int:
    """Every how many layers attention is full, by the first one; readers of recurrent_layers do not need it."""
    kinds = _recurrent(model)
    return kinds.index(False) + 1 if False in kinds else 4


def _sections(model: Model) -> list[int]:
    """How the pairs that rotate are divided between positions in time, height and width, which are equal in text: as
    config.json states, or in turns as the class does."""
    rope = rope_of(model)
    pairs = int(model.value("head_dim") * float(rope.get("partial_rotary_factor") or 1.0)) // 2
    found = rope.get("mrope_section") or [-(-(pairs - at) // 3) for at in range(3)]
    return [*found, 0][:4]


_NUMBERS: dict[str, Number] = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": lambda model: model.value("linear_value_head_dim") * model.value("linear_num_value_heads"),
    "attention.recurrent_layers": _recurrent,
    "full_attention_interval": _interval,
}
_EXPERTS: dict[str, Number] = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_PLUS_ONE: dict[str, Change] = dict.fromkeys(
    ("norm.attention", "norm.ffn", "norm.final", "attention.q_norm", "attention.k_norm"), plus_one
)


def _equal_heads(model: Model) -> str | None:
    """llama.cpp has one size for the heads of keys and of values."""
    same = model.value("linear_key_head_dim") == model.value("linear_value_head_dim")
    return None if same else "heads of linear attention whose keys and values differ in size"


# the class normalises queries and keys of linear attention by an epsilon of its own, llama.cpp by that of the model
_NEEDS: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "rms_norm_eps": (1e-6,)}
NEXT = LlamaCpp(
    "qwen3next",
    names=_NAMES,
    changes=_PLUS_ONE | {"linear.A": _decay, "linear.conv": without_middle_axis, "linear.qkvz": _by_kind},
    needs=_NEEDS | {"norm_topk_prob": (True,)},
    checks=(_equal_heads,),
    numbers=_NUMBERS | _EXPERTS,
    rope=frozenset({"default", "linear", "yarn"}),
)
DENSE = replace(
    NEXT,
    arch="qwen35",
    changes=_PLUS_ONE
    | {
        "linear.A": lambda get, part: {"": _tiled(part.negative_exp(), get, axis=0, width=1)},
        "linear.dt": _values(0, _one),
        "linear.a": _values(0, _one),
        "linear.b": _values(0, _one),
        "linear.conv": _behind_keys,
        "linear.qkv": _behind_keys,
        "linear.z": _values(0, _head),
        "linear.out": _values(1, _head),
    },
    needs=_NEEDS,
    numbers=_NUMBERS | {"rope.dimension_sections": _sections},
)

ROWS = {
    "qwen3_next": NEXT,
    "qwen3_5_text": DENSE,
    "qwen3_5_moe_text": replace(DENSE, arch="qwen35moe", numbers={**DENSE.numbers, **_EXPERTS}),
}
