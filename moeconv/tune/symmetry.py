"""Finds layers whose router cannot learn: the experts are identical copies, and the routing weights sum to one.

The output of such a layer does not depend on the router, so the gradient of any loss is zero (Sparse Upcycling, arXiv
2212.05055, starts like this). Compares bytes on disk, and loads neither torch nor a model.
"""

from __future__ import annotations

from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.spec import FFN_PARTS

_BLOCK = 1 << 22
REMEDIES = (
    "Upcycle with --method noise or drop, which make the experts differ, "
    "or pass --balance-only to train the routers on load balance alone."
)


def identical_layers(model: Model) -> tuple[int, ...]:
    """The MoE layers whose experts are all identical, byte for byte. For other layers, about one block per matrix is
    read."""
    return tuple(layer for layer in model.moe_layers if _all_alike(model, layer))


def _all_alike(model: Model, layer: int) -> bool:
    return all(
        same_tensor(
            model, model.expert_name(part, layer=layer, expert=0),
            model, model.expert_name(part, layer=layer, expert=expert),
        )
        for expert in range(1, model.num_experts)
        for part in FFN_PARTS
    )  # fmt: skip


def same_tensor(a: Model, name_a: str, b: Model, name_b: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    x, y = a.checkpoint.tensors[name_a], b.checkpoint.tensors[name_b]
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return all(
        a.checkpoint.read(name_a, start=start, length=min(_BLOCK, x.nbytes - start))
        == b.checkpoint.read(name_b, start=start, length=min(_BLOCK, x.nbytes - start))
        for start in range(0, x.nbytes, _BLOCK)
    )


def check_symmetry(
    model: Model, *, objective: str, train: tuple[str, ...], straight_through: bool, teacher: Model | None = None
) -> list[str]:
    """Warnings about layers whose router cannot learn. Raises InputError if no layer can learn."""
    if "router" not in train or not model.renormalises:
        return []  # the weights do not sum to one, so that the router at least scales the output
    if model.top_k == 1 and not straight_through:
        raise InputError(
            "top-k is 1 and the weight is always 1, so the gradient of the router is zero",
            hint="Leave out --no-straight-through, or pass --balance-only.",
        )
    stuck = identical_layers(model)
    if "experts" in train and not (teacher is not None and _is_teacher(model, teacher, stuck)):
        return []  # every copy gets other tokens, so that the copies differ after the first step
    if stuck == model.moe_layers and set(train) <= {"router", "experts"}:
        why = "they already equal the teacher's FFN" if "experts" in train else "the router's gradient is zero"
        raise InputError(
            f"the {model.num_experts} experts are identical copies in every layer and the top-{model.top_k} weights "
            f"sum to one: {why}, so {objective} has nothing to train",
            hint=REMEDIES,
        )
    return [f"layer {layer}: the experts are identical, so its router does not train" for layer in stuck]


def _is_teacher(model: Model, teacher: Model, layers: tuple[int, ...]) -> bool:
    """Whether the experts of each of these layers are copies of the dense teacher's FFN, so that the loss is
    minimal."""
    if teacher.moe_layers or teacher.num_layers != model.num_layers or not layers:
        return False
    if not all(teacher.family.has(f"ffn.{part}") for part in FFN_PARTS):
        return False  # a fused FFN is not compared; the check on held-out data remains
    return all(
        same_tensor(model, model.expert_name(p, layer=at, expert=0), teacher, teacher.ffn_name(p, layer=at))
        for at in layers
        for p in FFN_PARTS
    )
