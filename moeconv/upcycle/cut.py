"""How the neurons of an FFN are divided: pieces, their width, and the neurons of the shared expert.

G pieces of an FFN are a virtual group (arXiv 2410.07524): their router rows are equal, so that top-k = G * j chooses
whole copies, and each piece gets 1/G of its copy's weight. The routed sum times G is then the output of the FFN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeconv.errors import InputError, UsageError, escape
from moeconv.families.spec import Family
from moeconv.options import EXPERTS, TOP_K, UpcycleOptions

_SHARE = re.compile(r"^(?:(\d+(?:\.\d+)?)%|(\d*\.\d+|\d+\.\d*))$")


@dataclass(frozen=True, slots=True)
class Cut:
    """The division of an FFN of `ffn` neurons: `experts` experts of `width` neurons, of which each token gets `top_k`.
    `pieces` experts together hold every routed neuron once. `shared` neurons are always on.

    `idle`: the shared expert is the whole FFN, and the output of the routed experts starts at zero.
    """

    ffn: int
    pieces: int
    width: int
    shared: int = 0
    idle: bool = False
    experts: int = 0
    top_k: int = 0

    def first(self, expert: int) -> int:
        """The first neuron of an expert, where the pieces keep the order of the FFN."""
        return (0 if self.idle else self.shared) + (expert % self.pieces) * self.width


def counts(options: UpcycleOptions) -> tuple[int, int]:
    """(experts, top-k) of a method without copies: the options, or their defaults."""
    experts = EXPERTS if options.experts is None else options.experts
    return experts, min(experts, TOP_K) if options.top_k is None else options.top_k


def cut_ffn(ffn: int, *, granularity: int, shared: str | None) -> Cut:
    """The cut of an FFN of `ffn` neurons. `shared` is a number of the `granularity` pieces, a share of the FFN (0.25 or
    25%), or full. Raises UsageError for any other word, and where the neurons do not divide evenly."""
    if granularity < 1:
        raise UsageError(f"--granularity {granularity} must be at least 1")
    held, idle = _shared_neurons(ffn, granularity, shared)
    rest = ffn if idle else ffn - held
    pieces = granularity
    if shared is not None and shared.isdecimal() and not idle:
        pieces = granularity - int(shared)
    if rest % pieces:
        raise UsageError(
            f"--granularity {granularity}: {rest} neurons cannot be cut into {pieces} equal pieces",
            hint=f"The nearest numbers of pieces that divide them: {_near(rest, pieces)}.",
        )
    return Cut(ffn, pieces, rest // pieces, held, idle)


def _shared_neurons(ffn: int, granularity: int, text: str | None) -> tuple[int, bool]:
    if text is None or text in ("0", "none"):
        return 0, False
    flag = f"--shared-experts {escape(text)}"
    if text == "full":
        return ffn, True
    if text.isascii() and text.isdecimal() and len(text) < 6:
        if int(text) > granularity:
            raise UsageError(
                f"{flag}: the FFN is cut into {granularity} pieces (--granularity)",
                hint=f"Give a number of pieces up to {granularity}, a share such as 0.25, or full.",
            )
        if ffn % granularity:
            raise UsageError(
                f"--granularity {granularity} does not divide the FFN's {ffn} neurons",
                hint=f"The nearest divisors: {_near(ffn, granularity)}.",
            )
        return ffn // granularity * int(text), int(text) == granularity
    match = _SHARE.match(text)
    share = (float(match[1]) / 100 if match[1] else float(match[2])) if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(
            f"{flag}: neither a number of pieces, nor a share of the FFN above 0 up to 1, nor full",
            hint="Examples: --shared-experts full, --shared-experts 0.25, --granularity 8 --shared-experts 2.",
        )
    held = round(share * ffn)
    if not held:
        raise UsageError(f"{flag} is less than one of the {ffn} neurons", hint="Give a larger share.")
    return held, held == ffn


def _near(total: int, wish: int) -> str:
    divisors = sorted((d for d in range(1, min(total, 4096) + 1) if total % d == 0), key=lambda d: abs(d - wish))
    return ", ".join(map(str, sorted(divisors[:4])))


def shared_config(target: Family, cut: Cut) -> dict[str, int]:
    """The config keys that give the target's shared expert `cut.shared` neurons. Raises InputError where the target has
    no such keys."""
    if not cut.shared:
        return {}
    if target.experts.routed_norm and not cut.idle:
        raise InputError(
            f"{target.model_type} normalises the outputs of its dense branch and of its experts separately before it "
            f"adds them ({target.tensors.names[target.experts.routed_norm].rpartition('.layers.{L}.')[2]}), so that "
            "parts of one FFN in both do not add up to it",
            hint="With --shared-experts full, the dense branch keeps the whole FFN and the experts start at zero.",
        )
    keys = target.experts.shared_width
    if not keys:
        raise InputError(
            f"{target.model_type} has no shared expert",
            hint="See `moeconv families`: glm4_moe, dots1 and others have one.",
        )
    own = [key for key in keys if key != target.experts.width]
    unit = cut.width if target.experts.width in keys else 1
    if cut.shared % unit or (not own and cut.shared != unit):
        raise InputError(
            f"the shared expert of {target.model_type} must be {'as wide as one' if not own else 'a whole number of'} "
            f"routed expert{'' if not own else 's'} ({unit} neurons), and {cut.shared} neurons are not",
            hint="Give a number of pieces, such as --granularity 4 --shared-experts 1, or another target (--to).",
        )
    return {own[0]: cut.shared // unit} if own else {}


def grouped_config(target: Family, cut: Cut) -> dict[str, int]:
    """The config keys that make each copy a group of the router, where the family has such groups. Ties between equal
    logits can then not select pieces of two copies."""
    rule = target.experts.routing.groups if target.experts.routing else None
    if rule is None or cut.pieces == 1:
        return {}
    return {rule[0]: cut.experts // cut.pieces, rule[1]: cut.top_k // cut.pieces}
