"""The job of `tune`, checked before any expensive work: whether the models fit together, and whether the routers can
learn."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from moeconv.data.tokenizer import same_tokenizer
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model, open_model
from moeconv.options import TuneOptions, flag_of
from moeconv.tensors import decode_weight
from moeconv.tune.dense import check_dense
from moeconv.tune.optimise import Schedule
from moeconv.tune.symmetry import check_symmetry
from moeconv.tune.words import BIAS, correction_names, parse_train, tensors_of

# Peak learning rates times the hidden size: the best rate of Adam for a matrix is proportional to 1 / width (Tensor
# Programs V, arXiv 2203.03466). Measured at 128 and 256 on models upcycled with `drop`: the best rate for the
# regression of a layer is four times that for a whole model. The best rate for a random router that trains alone is ten
# times that for a router that trains with its experts, or that is already trained (of a pruned model: 0.128 lowers the
# KL, 1.28 does not).
_LAYERWISE, _WHOLE = 1.0, 0.256
_ROUTER_ALONE, _ROUTER_ALONG = 1.28, 0.128
_MOST = 0.01
_NORMS = 1e-3  # for vectors, whose best rate does not depend on the width
_SAME = 0.02  # the largest relative difference that another dtype or packing to 8 bits makes


@dataclass(frozen=True)
class Job:
    """The student, its teacher, the objective, what trains, and how. `objective` is "balance" with --balance-only."""

    student: Model
    teacher: Model | None
    objective: str
    train: tuple[str, ...]
    schedule: Schedule
    balance: float
    z_loss: float
    bias_update: float
    router_noise: float
    temperature: float
    capacity_factor: float | None
    straight_through: bool
    seed: int
    batch_size: int
    warnings: tuple[str, ...] = ()

    @property
    def opened(self) -> tuple[str, ...]:
        """The words of --train for everything that changes: what has a gradient, and the correction bias if it is
        updated."""
        return (*self.train, BIAS) if self.bias_update else self.train


def make_job(model_path: str | os.PathLike[str], options: TuneOptions, *, seed: int, batch_size: int) -> Job:
    """Open the models and check the options.

    Raises UsageError for options that cannot be used, InputError for models that cannot be tuned with them.
    """
    train = parse_train(options.train)
    _check_numbers(options, batch_size)
    if options.balance_only and train != ("router",):
        raise UsageError("--balance-only trains only the routers", hint="Leave out --train.")
    objective = "balance" if options.balance_only else options.objective
    if objective == "layerwise" and "norms" in train:
        raise UsageError(
            "--train norms: the objective layerwise starts after the norms, so they have no gradient",
            hint="Use --objective distill.",
        )
    student = open_model(model_path)
    dense = not student.moe_layers
    if dense:
        check_dense(student, options, train, objective)
    _check_student(student)
    _check_bias(options, student)
    teacher = _open_teacher(options.teacher, student, objective)
    if not tensors_of(student, train):
        raise InputError(
            f"{student.family.model_type} has no tensor that --train {options.train} names",
            hint="Every Mixture-of-Experts has `router` and `experts`; not all have `shared`, or dense layers (`ffn`).",
        )
    through, warnings = False, list[str]()  # the balance loss depends only on the router's probabilities
    if objective != "balance" and not dense:
        through, warnings = _straight_through(options.straight_through, student, train)
        warnings += check_symmetry(student, objective=objective, train=train, straight_through=through, teacher=teacher)
    learned = teacher is not None and bool(teacher.moe_layers)
    rates = _rates(options.learning_rate, train, objective=objective, hidden=student.hidden_size, learned=learned)
    schedule = Schedule(options.steps, rates, options.schedule, options.warmup, options.look_every, options.patience)
    balance = 1.0 if objective == "balance" else 0.0 if dense else options.balance
    return Job(
        student, teacher, objective, train, schedule, balance,
        options.z_loss, options.bias_update, options.router_noise, options.temperature, options.capacity_factor,
        through, seed, batch_size, tuple(warnings),
    )  # fmt: skip


def _rates(
    asked: float | None, train: tuple[str, ...], *, objective: str, hidden: int, learned: bool
) -> dict[str, float]:  # fmt: skip
    """{word of --train: peak learning rate}: the given one, or defaults by the width. `learned`: the router is already
    trained, as after an edit of a Mixture-of-Experts."""
    weights = _LAYERWISE if objective == "layerwise" else _WHOLE
    scales = {
        "router": _ROUTER_ALONG if "experts" in train or learned else _ROUTER_ALONE,
        "experts": weights,
        "shared": weights,
        "ffn": weights,
    }
    rates = {word: min(_MOST, scale / hidden) for word, scale in scales.items()} | {"norms": _NORMS}
    return {word: rates[word] if asked is None else asked for word in train}


def _check_numbers(options: TuneOptions, batch_size: int) -> None:
    """Raises UsageError for a number outside its range."""
    if options.steps < 1:
        raise UsageError(f"--steps {options.steps}: expected at least 1")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    if options.learning_rate is not None and not (options.learning_rate > 0 and math.isfinite(options.learning_rate)):
        raise UsageError(f"--learning-rate {options.learning_rate}: expected a number above 0")
    for name in ("look_every", "patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_of(name)} {value}: expected at least 1")
    for name in ("temperature", "capacity_factor"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{flag_of(name)} {value}: expected a number above 0")
    if not 0 <= options.warmup <= 1:
        raise UsageError(f"--warmup {options.warmup}: expected a share of the steps, from 0 to 1")
    for name in ("balance", "z_loss", "bias_update", "router_noise"):
        value = getattr(options, name)
        if not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"{flag_of(name)} {value}: expected a number, at least 0")


def _straight_through(asked: bool | None, model: Model, train: tuple[str, ...]) -> tuple[bool, list[str]]:
    """(whether the router's gradient goes through all experts, warnings). A warning says that this is not possible.

    By default it does if the experts do not train. Experts that train recover more without it, and a step then costs
    two thirds (measured). Where the weight of the single chosen expert is always 1, the router has no other gradient.
    """
    assert model.family.experts.routing is not None
    if model.family.experts.routing.score not in ("softmax", "softmax_topk", "sigmoid"):
        text = f"{model.family.model_type} routes by a rule that --straight-through does not support, so it is off"
        return False, [text] if asked else []
    return ("experts" not in train or _always_one(model)) if asked is None else asked, []


def _always_one(model: Model) -> bool:
    """Whether every token has one expert, with the weight 1."""
    return model.top_k == 1 and model.renormalises


def _check_alone(model: Model) -> None:
    if model.family.multimodal.beside:
        raise InputError(
            f"{model.family.model_type} is multimodal, and --data has no images: training the language model on text "
            "alone would separate it from its vision tower",
            hint="`moeconv prune`, `calibrate`, `evaluate` and `quantize` work on it.",
        )


def _check_student(model: Model) -> None:
    _check_alone(model)
    model.check_separate_experts()
    if model.quantization:
        raise InputError(
            f"{escape(model.checkpoint.path)} is quantized, and packed weights cannot be trained",
            hint="Tune the unquantized model, then quantize it.",
        )


def _check_bias(options: TuneOptions, model: Model) -> None:
    if options.bias_update and len(correction_names(model)) < len(model.moe_layers):
        raise UsageError(
            f"--bias-update: not every router of this {model.family.model_type} model has a correction bias",
            hint="Use --balance instead. DeepSeek-V3 and related families have such a bias.",
        )


def _open_teacher(path: str | None, student: Model, objective: str) -> Model | None:
    if path is None:
        if objective in ("distill", "layerwise"):
            raise UsageError(
                f"--objective {objective} needs a teacher",
                hint="Pass --teacher with the dense source or with the model before the edit, or use --objective lm.",
            )
        return None
    teacher = open_model(path)
    _check_alone(teacher)
    sizes = {"vocab_size": "tokens in its vocabulary"}
    if objective == "layerwise":
        sizes |= {"num_hidden_layers": "layers", "hidden_size": "dimensions in its hidden states"}
    for key, what in sizes.items():
        ours, theirs = student.value(key), teacher.value(key)
        if ours != theirs:
            raise InputError(
                f"the teacher does not fit: it has {theirs} {what}, and the model has {ours}",
                hint="The teacher must be the dense source of this model, or the model before an edit.",
            )
    if objective == "layerwise":
        _check_same_stream(student, teacher)
    if not same_tokenizer(student.checkpoint.path, teacher.checkpoint.path):
        raise InputError(
            "the teacher has another tokenizer than the model, so the same tokens mean other text",
            hint="Pass a teacher with the same tokenizer.json.",
        )
    return teacher


def _check_same_stream(student: Model, teacher: Model) -> None:
    """Raises InputError if an FFN of the teacher does not mean the same in the student. A conversion may have folded a
    factor into every matrix that writes to the residual stream (the multipliers of Granite), or centred the stream
    (OLMo). The output matrix of the attention in one layer then differs between the two models."""
    key, layer = "attention.o", student.moe_layers[0]
    if not (student.family.has(key) and teacher.family.has(key)):
        return
    name, other = (model.family.name(key, layer=layer) for model in (student, teacher))
    if name not in student.roles or other not in teacher.roles:
        return
    ours, theirs = decode_weight(student, name).float(), decode_weight(teacher, other).float()
    if ours.shape != theirs.shape or float((ours - theirs).norm()) > _SAME * float(theirs.norm()):
        raise InputError(
            f"the teacher's FFN outputs are no targets for this model: {escape(name)} differs from the teacher's "
            f"{escape(other)}, so the conversion changed the residual stream",
            hint="Use --objective distill.",
        )
