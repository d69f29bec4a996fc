"""The number of neurons that every expert keeps: --width, --width-ratio, and what they are rounded to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.families.shapes import shared_width
from moeconv.families.widths import multiple_of, why_not
from moeconv.options import PlanOptions, PruneOptions, flag_of
from moeconv.plan.build import parse_dtype
from moeconv.units import counted

ORIGIN = "neurons"  # the origin, in a plan, of the file with the neurons that stay
_USUAL = 64  # neurons, where experts are wide enough: kernels of serving engines work on tiles of that size
_OF_EXPERTS = (
    "keep", "ratio", "max_bytes", "mix", "max_loss_increase", "threshold", "criterion", "similarity", "stats", "heal",
    "rescale", "sequential", "merge", "distill", "top_k", "curve", "protect_coverage", "protect", "shared_width",
)  # fmt: skip
_STEPS = 8  # steps between no neuron and all, at least, if the user did not ask for a multiple


@dataclass(frozen=True)
class Width:
    """The neurons of every expert: `before`, `after`, the number that was `asked` for, and the `multiple` to which it
    was rounded (None where the user gave the number itself). `shared` is the number that the shared expert keeps, if it
    has one of its own."""

    before: int
    after: int
    asked: float
    multiple: int | None
    shared: int | None = None

    def narrow(self, model: Model) -> Narrow:
        """The view of the narrower model."""
        return Narrow(model, self.after, self.shared)

    @property
    def remarks(self) -> list[str]:
        """The warning about rounding."""
        if self.multiple is None or self.asked == self.after:
            return []
        return [
            f"{self.asked:g} of {self.before} neurons were asked for, but {self.after} are kept: a multiple of "
            f"{self.multiple} (--multiple)"
        ]


def asks_width(options: PruneOptions) -> bool:
    """Whether the experts, or the shared expert, lose neurons."""
    return any(getattr(options, name) is not None for name in ("width", "width_ratio", "shared_width", "mix"))


def neurons_name(layer: int, group: str) -> str:
    """The name of the tensor I32 [n, W] with the neurons that the experts (or the shared expert, or the FFN) of a layer
    keep."""
    return f"layer.{layer}.{group}"


def chosen_width(model: Model, options: PruneOptions, common: PlanOptions) -> Width | None:
    """The width that the options state; None if they state none, or if it is measured (--mix).

    Raises UsageError for a number that the model cannot have, InputError for a shared expert that cannot be cut."""
    if options.shared_width is None:
        return _of_experts(model, options, common)
    width = _of_experts(model, options, common) or Width(model.cut_width, model.cut_width, model.cut_width, None)
    _check_shared(model, options.shared_width, width.after)
    return replace(width, shared=options.shared_width)


def _check_shared(model: Model, neurons: int, width: int) -> None:
    """Raises UsageError for a number of `neurons` that the shared expert cannot have beside experts of `width` neurons,
    InputError for a model without a shared expert that has a width of its own."""
    name, before = model.family.model_type, shared_width(model.family.experts.shared_width, model.value)
    if not before:
        raise InputError(
            f"--shared-width: this model of type {name} has no shared expert", hint="Leave out --shared-width."
        )
    key, of_one = Narrow(model, width, neurons).shared_key
    if not key:
        raise InputError(
            f"--shared-width: the shared expert of {name} is as wide as every expert, because config.json has one key "
            f"for both ({model.family.experts.width})",
            hint="Pass --width or --width-ratio, which cut it with the experts.",
        )
    if not 1 <= neurons < before:
        raise UsageError(
            f"--shared-width {neurons}: expected 1 to {before - 1}, because the shared expert has {before} neurons"
        )
    if neurons % of_one:
        raise UsageError(
            f"--shared-width {neurons}: expected a multiple of {of_one}, because config.json states the width as "
            f"{' x '.join(model.family.experts.shared_width)}",
            hint=f"Pass {max(1, neurons // of_one) * of_one}, or a smaller --width too."
            if of_one < before
            else "Pass a smaller --width too.",
        )


def _of_experts(model: Model, options: PruneOptions, common: PlanOptions) -> Width | None:
    """The width of the routed experts, or of the FFNs of a dense model, that the options state."""
    if options.width is None and options.width_ratio is None:
        return None
    before, unit = model.cut_width, multiple(model, options, common)
    if options.width is not None:
        if not 1 <= options.width < before:
            each = "expert" if model.num_experts else "FFN"
            raise UsageError(
                f"--width {options.width}: expected 1 to {before - 1}, because every {each} has {before} neurons"
            )
        why = None
        if model.num_experts:  # products of a dense FFN take any size
            why = why_not(model.family, width=options.width, hidden=0, dtype=_dtype(model, common))
        if why is not None:
            raise UsageError(why, hint=f"The next smaller width is {options.width // unit * unit}.")
        _check_layout(model, options.width)
        return Width(before, options.width, options.width, None)
    ratio = options.width_ratio
    assert ratio is not None
    if not 0 < ratio < 1:
        raise UsageError(f"--width-ratio {ratio} must be between 0 and 1", hint="For a quarter: --width-ratio 0.25.")
    asked = before * (1 - ratio)
    after = round(asked / unit) * unit
    if not 0 < after < before:
        raise UsageError(
            f"--width-ratio {ratio} of {counted(before, 'neuron')} rounds to {after} neurons, a multiple of {unit}",
            hint="Pass another ratio, --width, or a smaller --multiple.",
        )
    _check_layout(model, after)
    return Width(before, after, round(asked, 6), unit)


def _check_layout(model: Model, width: int) -> None:
    """Raises UsageError for a width with which a loader cannot see whether matrices are transposed, InputError for a
    model whose config cannot state the width."""
    if Narrow(model, width).narrowed.cut_width != width:
        raise InputError(
            f"config.json of {model.family.model_type} cannot state a width of {width}",
            hint="Prune experts, or another model.",
        )
    if Narrow(model, width).ambiguous is not None:
        raise UsageError(
            f"with {counted(width, 'neuron')} per expert, a matrix of {model.family.model_type} would be square, and "
            "loaders tell from its shape whether it is transposed",
            hint="Pass another width.",
        )


def multiple(model: Model, options: PruneOptions, common: PlanOptions) -> int:
    """The number of which a chosen width is a multiple: --multiple, else 64, or a smaller power of two where the
    experts are narrow, but at least what transformers' products of all experts take."""
    least = multiple_of(model.family, _dtype(model, common)) if model.num_experts else 1
    if options.multiple is not None:
        if options.multiple < 1 or options.multiple % least:
            raise UsageError(
                f"--multiple {options.multiple}: expected a multiple of {least}, which transformers needs",
                hint=f"Pass {-(-max(1, options.multiple) // least) * least}.",
            )
        return options.multiple
    unit = _USUAL
    while unit > least and unit * _STEPS > model.cut_width:
        unit //= 2
    return max(unit, least)


def _dtype(model: Model, common: PlanOptions) -> str:
    return parse_dtype(common.dtype) or model.dtype


def check_width(model: Model, options: PruneOptions) -> None:
    """Raises UsageError for options that exclude a smaller width, InputError for a model whose experts cannot become
    narrower."""
    if options.multiple is not None and options.width_ratio is None and options.mix is None:
        raise UsageError("--multiple goes with --width-ratio or --mix", hint="--width states the number itself.")
    given = [n for n in ("width", "width_ratio", "mix", "shared_width") if getattr(options, n) is not None]
    if not given:
        return
    flag = flag_of(given[0])
    if len(given) > 1 and (given[1] != "shared_width" or given[0] == "mix"):
        raise UsageError(f"{flag} and {flag_of(given[1])} exclude each other", hint="Pass one of them.")
    for name in ("merge", "sequential", "rescale", "curve"):
        if getattr(options, name) and not (name == "curve" and options.mix is not None):
            raise UsageError(f"{flag} and {flag_of(name)} exclude each other", hint=f"Leave out {flag_of(name)}.")
    given = [name for name in ("keep", "threshold", "max_loss_increase") if getattr(options, name) is not None]
    if options.mix is not None and (given not in ([], ["max_loss_increase"]) or not (given or _sizes(options))):
        raise UsageError(
            "--mix divides what --ratio, --max-bytes or --max-loss-increase removes between experts and neurons, and "
            + (f"{flag_of(given[0])} is given" if given else "none of them is given"),
            hint="For half: --ratio 0.5.",
        )
    if options.mix is None and given not in ([], ["keep"]):
        raise UsageError(f"{flag} and {flag_of(given[-1])} exclude each other", hint="Pass --keep or --ratio.")
    if model.quantization is not None:
        raise InputError(
            f"{flag} cuts the matrices of the {'experts' if model.num_experts else 'FFNs'}, and those of this model "
            "are quantized",
            hint="Prune the unquantized checkpoint, and quantize the result.",
        )


def _sizes(options: PruneOptions) -> bool:
    """Whether a mix has something to divide: a share, a size, or every ratio of a curve."""
    return options.ratio is not None or options.max_bytes is not None or options.curve


def check_dense(model: Model, options: PruneOptions) -> None:
    """Raises UsageError for an option about experts, of which a dense model has none, InputError for a model that would
    remain as it is."""
    if not asks_width(options):
        raise InputError(
            f"{model.family.model_type} has no experts to prune",
            hint="Give a Mixture-of-Experts model, or cut the neurons of its FFNs: --width-ratio 0.25.",
        )
    changed = [name for name in _OF_EXPERTS if getattr(options, name) != getattr(PruneOptions(), name)]
    if changed:
        raise UsageError(
            f"{flag_of(changed[0])} is about experts, and {model.family.model_type} is dense",
            hint="A dense model takes --width or --width-ratio, with --data and --refit.",
        )
