"""Which tensor of a GGUF file gets which type: the recipes of llama-quantize, as tables of rules.

llama.cpp, src/llama-quant.cpp: the tensors that it quantizes, the parts of a model that its rules name, and for each
recipe the rules by layer, by number of experts and by the ratio of query to key heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.quantize.gguf.types import BY_DTYPE, LOADS, RUN, TYPES, fitting
from moeconv.quantize.spec import SchemeInfo

# what a name contains -> the part of the model, the first that fits; other tensors have the recipe's own type
_PARTS: Mapping[str, str] = {
    "attn_qkv.weight": "attn_qkv", "attn_kv_b.weight": "attn_kv_b", "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k", "attn_q.weight": "attn_q", "attn_output.weight": "attn_output", "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate", "ffn_down": "ffn_down",
}  # fmt: skip
_WHOLE = {"output.weight": "output", "token_embd.weight": "token_embd", "per_layer_token_embd.weight": "token_embd"}
VALUES = ("attn_v", "attn_qkv", "attn_kv_b")  # values of attention, which its rules treat alike
# matrices that it leaves as they are, besides norms
_KEPT = (
    "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
)  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.")
_LARGE = 80  # layers of a model whose few heads of values get more bits, where it has that many layers
_LARGE_ARCHS = ("llama", "qwen2", "deci", "olmo")
EIGHT = 8  # experts, for which some rules differ


@dataclass(frozen=True, slots=True)
class TypeRule:
    """The type of a part of the model, where all conditions hold.

    `part` is one of the parts above, or "values" for all VALUES. `first`: in the first 1/`first` of the layers.
    `before`: in the first `before` layers. `more`: in the first and the last eighth, and in every third layer between.
    `gqa`: where at least that many heads of queries share keys. `eight`: whether the model has 8 experts. `imatrix`:
    whether there is an importance matrix.
    """

    part: str
    dtype: str
    first: int = 0
    before: int = 0
    more: bool = False
    gqa: int = 0
    eight: bool | None = None
    imatrix: bool | None = None

    def holds(self, part: str, at: int, layers: int, facts: Facts) -> bool:
        """Whether the rule is for the tensor of that part, the `at`-th of its kind."""
        named = part == self.part or (self.part == "values" and part in VALUES)
        return (
            named
            and (not self.first or at < layers // self.first)
            and (not self.before or at < self.before)
            and (not self.more or _more_bits(at, layers))
            and facts.gqa >= self.gqa
            and self.eight in (None, facts.experts == EIGHT)
            and self.imatrix in (None, facts.imatrix)
        )


@dataclass(frozen=True, slots=True)
class TypeRecipe:
    """A recipe: its name for --scheme, llama.cpp's number for it, the type of most matrices, and the rules, of which
    the first that holds counts. `experts` is the type of stacked experts where it differs, `output` that of the head.
    """

    name: str
    file_type: int
    dtype: str
    rules: tuple[TypeRule, ...] = ()
    experts: str = ""
    output: str = "Q6_K"
    needs_imatrix: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules depend on: llama.cpp's architecture, number of layers and experts, heads of queries per head of keys,
    and whether there is an importance matrix."""

    arch: str
    layers: int
    experts: int
    gqa: int
    imatrix: bool = False


def _more_bits(at: int, layers: int) -> bool:
    return at < layers // 8 or at >= 7 * layers // 8 or (at - layers // 8) % 3 == 2


# for every recipe, after its own rules: the few values and keys of a model of 8 experts
_ALWAYS = (TypeRule("values", "Q8_0", eight=True), TypeRule("attn_k", "Q8_0", eight=True))
_OUTPUT_EIGHT = TypeRule("attn_output", "Q5_K", eight=True)

RECIPES: tuple[TypeRecipe, ...] = (
    TypeRecipe("q2_k", 10, "Q2_K", (
        TypeRule("values", "Q4_K", gqa=4), TypeRule("values", "Q3_K"), TypeRule("ffn_down", "Q3_K"), _OUTPUT_EIGHT,
        TypeRule("attn_output", "Q3_K"),
    )),
    TypeRecipe("q2_k_s", 21, "Q2_K", (TypeRule("values", "Q4_K", gqa=4), TypeRule("ffn_down", "Q4_K", first=8)),
           needs_imatrix=True),
    TypeRecipe("q3_k_s", 11, "Q3_K", (_OUTPUT_EIGHT,)),
    TypeRecipe("q3_k_m", 12, "Q3_K", (
        TypeRule("values", "Q5_K", before=2), TypeRule("values", "Q4_K"), TypeRule("ffn_down", "Q5_K", first=16),
        TypeRule("ffn_down", "Q4_K"), _OUTPUT_EIGHT, TypeRule("attn_output", "Q4_K"),
    )),
    TypeRecipe("q3_k_l", 13, "Q3_K", (
        TypeRule("values", "Q5_K"), TypeRule("ffn_down", "Q5_K"), TypeRule("attn_output", "Q5_K", eight=False),
    )),
    TypeRecipe("q4_k_s", 14, "Q4_K", (
        TypeRule("values", "Q5_K", before=4), TypeRule("ffn_down", "Q5_K", first=8), _OUTPUT_EIGHT,
    )),
    TypeRecipe("q4_k_m", 15, "Q4_K", (
        TypeRule("values", "Q6_K", more=True), TypeRule("ffn_down", "Q6_K", more=True), _OUTPUT_EIGHT,
    )),
    TypeRecipe("q5_k_s", 16, "Q5_K"),
    TypeRecipe("q5_k_m", 17, "Q5_K", (TypeRule("values", "Q6_K", more=True), TypeRule("ffn_down", "Q6_K", more=True))),
    TypeRecipe("q6_k", 18, "Q6_K"),
    TypeRecipe("q8_0", 7, "Q8_0", output="Q8_0"),
    TypeRecipe("q4_0", 2, "Q4_0", (TypeRule("ffn_down", "Q4_1", first=8, imatrix=True),)),
    TypeRecipe("q4_1", 3, "Q4_1"),
    TypeRecipe("q5_0", 8, "Q5_0", (TypeRule("ffn_down", "Q5_1", first=8, imatrix=True),)),
    TypeRecipe("q5_1", 9, "Q5_1"),
    TypeRecipe("iq4_nl", 25, "IQ4_NL", (
        TypeRule("values", "Q5_K", gqa=4), TypeRule("ffn_down", "Q5_K", first=8, imatrix=False), _OUTPUT_EIGHT,
    )),
    TypeRecipe("iq4_xs", 30, "IQ4_XS", (
        TypeRule("values", "Q5_K", gqa=4), TypeRule("ffn_down", "Q5_K", first=8, imatrix=False), _OUTPUT_EIGHT,
    )),
    TypeRecipe("mxfp4", 38, "Q8_0", experts="MXFP4", output="Q8_0"),
    TypeRecipe("f16", 1, "F16"),
    TypeRecipe("bf16", 32, "BF16"),
    TypeRecipe("f32", 0, "F32"),
)  # fmt: skip
BY_NAME: Mapping[str, TypeRecipe] = {recipe.name: recipe for recipe in RECIPES}
# the type of --scheme -> the recipe that llama-quantize makes of that word, with --scope all
_WORDS = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def recipe_of(scheme: str) -> TypeRecipe:
    """The recipe for a value of --scheme where the whole file is quantized."""
    return BY_NAME[_WORDS.get(scheme, scheme)]


def recipe_schemes() -> tuple[SchemeInfo, ...]:
    """The records of --scheme for the recipes that no type has the name of."""
    types = {kind.name for kind in TYPES}
    return tuple(
        SchemeInfo(
            recipe.name, BY_DTYPE[recipe.dtype].bits, recipe.dtype, LOADS, limit=5 * BY_DTYPE[recipe.dtype].error,
            measured=RUN, error=BY_DTYPE[recipe.dtype].error, whole=True,
        )
        for recipe in RECIPES
        if recipe.name not in types
    )  # fmt: skip


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize quantizes the tensor of that name and row-major shape."""
    return (
        any(n > 1 for n in shape[:-1])
        and name.endswith("weight")
        and "_norm.weight" not in name
        and not any(part in name for part in _KEPT)
    )


def assign(recipe: TypeRecipe, shapes: Mapping[str, tuple[int, ...]], facts: Facts) -> dict[str, str]:
    """The dtype of every tensor that the recipe quantizes, by its name. `shapes` has the row-major shape of every
    tensor of the file."""
    chosen: dict[str, str] = {}
    tied = "output.weight" not in shapes
    counts: dict[str, int] = {}
    totals = sum(_part(name) in VALUES for name in shapes)
    for name in sorted(shapes, key=_order):
        shape = shapes[name]
        if not is_quantized(name, shape):
            continue
        part = _part(name)
        if recipe.dtype in ("F32", "F16", "BF16"):
            chosen[name] = recipe.dtype
        elif part == "output" or (part == "token_embd" and tied):
            chosen[name] = _of_output(recipe, shape[-1])
        else:
            kind = _counted(part)
            at = counts.get(kind, 0)
            counts[kind] = at + 1
            chosen[name] = fitting(_by_rules(recipe, name, part, at, totals, shape, facts), shape[-1])
    return chosen


def _by_rules(
    recipe: TypeRecipe, name: str, part: str, at: int, values: int, shape: tuple[int, ...], facts: Facts
) -> str:  # fmt: skip
    if recipe.experts:
        return recipe.experts if len(shape) > 2 else recipe.dtype
    of = values if part in VALUES else facts.layers
    if part not in VALUES and facts.experts > 1:
        at = _layer(name)
    held = (rule.dtype for rule in recipe.rules if rule.holds(part, at, of, facts))
    dtype = next(held, recipe.dtype)
    if part in VALUES and facts.layers == _LARGE and facts.gqa > 1 and facts.arch in _LARGE_ARCHS:
        dtype = "Q5_K" if dtype in ("Q3_K", "Q4_K") else dtype
    return next((rule.dtype for rule in _ALWAYS if rule.holds(part, at, of, facts)), dtype)


def _of_output(recipe: TypeRecipe, columns: int) -> str:
    """The type of the head, and of the embedding where it is the head too."""
    dtype = recipe.output if fitting(recipe.dtype, columns) == recipe.dtype else "Q8_0"
    return fitting(dtype, columns)


def _counted(part: str) -> str:
    return "values" if part in VALUES else part


def _part(name: str) -> str:
    return _WHOLE.get(name) or next((part for text, part in _PARTS.items() if text in name), "")


def _layer(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _order(name: str) -> tuple[int, str]:
    """llama.cpp goes through the tensors by layer, then by name."""
    return _layer(name), name
