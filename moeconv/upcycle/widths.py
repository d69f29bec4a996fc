"""Expert widths that transformers' default kernels cannot compute: refused, with the nearest cuts that they can."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.families.widths import multiple_of, why_not
from moeconv.options import UpcycleOptions
from moeconv.upcycle.cut import Cut, counts, cut_ffn
from moeconv.upcycle.methods import METHODS

_SHOWN = 2  # suggested cuts on either side
_TRIED = 4096  # pieces at most
_EAGER = 'it runs with experts_implementation="eager"'


def check_widths(model: Model, options: UpcycleOptions, target: Family, cut: Cut, dtype: str) -> list[str]:
    """A warning where already the source's sizes do not fit the kernels. Raises UsageError where the source's sizes do
    fit and those of the `cut` do not; `options` are the options that it was made with."""
    _check_orientation(target, cut, model.hidden_size)
    why = why_not(target, width=cut.width, hidden=model.hidden_size, dtype=dtype)
    if why is None:
        return []
    unit = multiple_of(target, dtype)
    if model.hidden_size % unit or model.ffn_width % unit:
        return [f"{why}; the source's own sizes do not fit them either: {_EAGER}"]
    near = list(_near(model.ffn_width, options, cut, unit))
    hint = f"The nearest that run: {', '.join(near)}." if near else "Leave out the option that cuts the FFN."
    raise UsageError(why, hint=hint)


def _check_orientation(target: Family, cut: Cut, hidden: int) -> None:
    """Raises UsageError where the class takes an expert's matrices transposed or not, and both shapes are the same."""
    for key, layout in target.tensors.packed.items():
        either = any(form.tensors.packed[key].transposed != layout.transposed for form in target.forms())
        if either and cut.width * len(layout.parts) == hidden:
            raise UsageError(
                f"experts of {cut.width} neurons at hidden_size {hidden} have square matrices in {target.model_type}: "
                "transformers 5 then reads as they are what the hub and all other runtimes have transposed",
                hint="Choose another --granularity, or number of slices, or leave them out.",
            )


def _near(ffn: int, options: UpcycleOptions, cut: Cut, unit: int) -> Iterator[str]:
    """The nearest cuts, below and above, whose width `unit` divides: each as the flag that makes it."""
    method = METHODS[options.method]
    shared, pieces = options.shared_experts, options.granularity or method.granularity
    if shared is not None and not shared.isdecimal():
        for step in (-1, 1):
            found = (h for h in range(cut.shared + step, ffn * (step > 0), step) if (ffn - h) % (unit * pieces) == 0)
            yield from (f"--shared-experts {_share(h, ffn)} (width {(ffn - h) // pieces})"
                        for h, _ in zip(found, range(_SHOWN)))  # fmt: skip
        return
    held = int(shared or 0)
    least = counts(options)[1] if method.partition else 1  # experts per token
    good = [g for g in range(held + least, min(ffn, _TRIED) + 1) if ffn % (g * unit) == 0]
    for granularity in sorted(good, key=lambda g: abs(g - pieces))[: 2 * _SHOWN]:
        width = cut_ffn(ffn, granularity=granularity, shared=shared).width
        if method.partition:
            yield f"--experts {granularity - held} (width {width})"
        else:
            yield f"--granularity {granularity} (width {width})"


def _share(held: int, ffn: int) -> str:
    """The share of `ffn` with the fewest digits that gives `held` neurons."""
    return next(text for digits in range(1, 12) if round(float(text := f"{held / ffn:.{digits}f}") * ffn) == held)
