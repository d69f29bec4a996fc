"""The memory that training takes, computed from the headers before any weight is read. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from moeconv.data.windows import sequence_length
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, MeasureOptions, TuneOptions
from moeconv.stream.need import Need, Workload, need_of, together, whole_need
from moeconv.tune.windows import HELD_OUT
from moeconv.tune.words import BIAS, parse_train, tensors_of

FLOWS = 3  # activations: the teacher's, and the inputs and outputs of the FFN of one layer
_TRAINED = 6  # copies of a layer's experts with gradients and moments
_FLOATS = ("F64", "F32", "BF16", "F16")


def tokens_of(options: TuneOptions, measure: MeasureOptions, *, length: int) -> int:
    """The number of tokens to read: --tokens, or the number that training draws; with layerwise, the number that
    calibration uses."""
    drawn = round(options.steps * measure.batch_size / (1 - HELD_OUT)) + measure.batch_size
    layerwise = options.objective == "layerwise" and not options.balance_only
    return max(measure.tokens or (TOKENS if layerwise else max(drawn, 2) * length), length)


def layerwise_need(
    student: Model, teacher: Model, *, tokens: int, seq_len: int, batch_size: int, experts: bool
) -> Need:
    """The memory of one layer of the teacher or of the student, whichever is larger. `experts`: the experts train
    too."""
    run, read = Workload(tokens, seq_len, batch_size, flows=FLOWS), _read_bytes(student)
    trained = replace(run, copies=_TRAINED if experts else 1, work=(0, 0) if experts else (read, read))
    return together([need_of(teacher, run), need_of(student, trained)])


def _read_bytes(model: Model) -> int:
    """The memory of the experts of a layer while they are read, in addition to the float32 copies: as stored if they
    are floats, otherwise in float32."""
    layers: dict[int | None, int] = {}
    for name, role in model.roles.items():
        if role.group == "expert":
            ref = model.checkpoint.tensors[name]
            nbytes = ref.nbytes if ref.dtype in _FLOATS else 4 * model.numel(ref)
            layers[role.layer] = layers.get(role.layer, 0) + nbytes
    return max(layers.values(), default=0)


def need_of_tune(
    student: Model, teacher: Model | None, options: TuneOptions, measure: MeasureOptions
) -> tuple[Need, Workload]:
    """(the memory that one process needs, its workload)."""
    models = [student, *([teacher] if teacher is not None else [])]
    length = min(sequence_length(model, measure.seq_len, default=SEQ_LEN) for model in models)
    train = parse_train(options.train)
    run = Workload(tokens_of(options, measure, length=length), length, measure.batch_size)
    if options.objective == "layerwise" and not options.balance_only and teacher is not None:
        need = layerwise_need(
            student, teacher, tokens=run.tokens, seq_len=length, batch_size=run.batch_size, experts="experts" in train
        )
        return need, run
    opened = (*train, BIAS) if options.bias_update else train
    return whole(student, teacher, opened, batch=run.batch_size * length), run


def whole(student: Model, teacher: Model | None, opened: tuple[str, ...], *, batch: int) -> Need:
    """The memory of whole models, of which the tensors that `opened` names train on `batch` tokens at a time."""
    names = tensors_of(student, opened)
    trained = sum(student.numel(student.checkpoint.tensors[name]) for name in names)
    return whole_need([student, *([teacher] if teacher is not None else [])], trained=trained, batch=batch)
