"""The importance of columns in the plan of a GGUF file: a second input of the items that encode matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.checkpoint.imatrix import Imatrix
from moeconv.plan.plan import Input, Item
from moeconv.quantize.gguf.llama_cpp import GgufTensor

ORIGIN = "imatrix"  # the origin of the importance in a plan: execute(..., origins={ORIGIN: imatrix})
_UNWEIGHED = ("Q8_0",)  # block dtypes whose codes do not depend on it
_NAMED = 8  # experts that a warning names


@dataclass
class Columns:
    """Adds the importance to items, and records what is missing."""

    imatrix: Imatrix | None
    experts: int
    missing: dict[str, None] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)

    def weigh(self, tensor: GgufTensor, item: Item) -> Item:
        """The item with the importance of its columns, where it encodes a matrix that has one. Raises InputError for
        an importance of another size."""
        dtype, target = item.outputs[0].dtype, tensor.target
        if self.imatrix is None or dtype not in BLOCK_DTYPES or dtype in _UNWEIGHED or item.kernel == "copy":
            return item
        columns = tensor.part.shape[-1]
        if not self.imatrix.fits(target, experts=1 if tensor.expert is None else self.experts, columns=columns):
            self.missing[target] = None
            return item
        self.used[target] = None
        name = f"{target}#{tensor.expert or 0}#{columns}"
        ref = Input(name, "F32", (columns,), 0, 4 * columns, ORIGIN)
        if item.kernel == "chain":
            copied = {"first": {"kernel": "copy", "params": {}}, "between": [name, "F32", [columns], 0, [columns]]}
            firsts = [{key: item.params[key] for key in ("first", "between")}, copied]
            params = {"firsts": [first | {"count": 1} for first in firsts], "then": item.params["then"]}
            item = replace(item, kernel="gather", params=params)
        return replace(item, inputs=(*item.inputs, ref))

    def warnings(self) -> list[str]:
        """What the importance matrix lacks."""
        if self.imatrix is None:
            return []
        found = [_unused(name, unused) for name, unused in self._unused().items()]
        lacking = [name for name in self.missing if name.startswith("blk.")]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            found.append(
                f"{self.imatrix.label} has no importance for {lacking[0]}{more}, so all its columns count the same"
            )
        return found

    def _unused(self) -> Mapping[str, list[int]]:
        assert self.imatrix is not None
        pairs = {name: self.imatrix.unused(name, experts=self.experts) for name in self.used}
        return {name: unused for name, unused in pairs.items() if unused and name.endswith("ffn_down_exps.weight")}


def _unused(name: str, experts: list[int]) -> str:
    listed = ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
    return f"{name}: no tokens were routed to the experts {listed}, which get the mean importance of the layer"
