"""How a quantized weight is stored in several tensors: the suffixes that replace `.weight`, and the part that each is.

A packed weight is a tensor that transformers names X.weight and that is stored in parts, each named X + a suffix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError, escape
from moeconv.families.encodings import ANY_LENGTH, Encoding, Part, Shape, parts_of
from moeconv.families.methods import encodings
from moeconv.types import Config, JsonObject

# suffix that replaces ".weight" -> name of the part. The first two are the codes.
PARTS: dict[str, str] = {
    ".weight_packed": "packed",
    ".weight": "weight",
    ".weight_scale": "scale",
    ".weight_scale_inv": "scale_inv",  # DeepSeek's FP8: one scale per block
    ".weight_zero_point": "zero_point",
    ".weight_global_scale": "global_scale",
    ".weight_scale_2": "scale_2",  # ModelOpt's NVFP4
    ".weight_g_idx": "order",
    ".input_scale": "input_scale",  # the scale of activations; the value of the weight does not depend on it
    ".activation_scale": "input_scale",
    ".input_global_scale": "input_scale",
    ".weight_shape": "shape",
    ".weight.absmax": "absmax",
    ".weight.quant_map": "quant_map",
    ".weight.nested_absmax": "nested_absmax",
    ".weight.nested_quant_map": "nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4": "state",
    ".weight.quant_state.bitsandbytes__fp4": "state",
    ".weight_format": "format",
    ".SCB": "SCB",
    ".qweight": "qweight",  # GPTQ and AWQ, with the scales below
    ".qzeros": "qzeros",
    ".g_idx": "g_idx",
    ".scales": "scales",  # also of MLX
    ".biases": "biases",
}
# suffixes that are appended to the full name of a tensor that holds all experts: MXFP4 codes and exponents, and the
# other parts of a weight whose codes have the tensor's own name. The first axis counts experts, except in SHARED parts.
STACKED_PARTS: dict[str, str] = {
    "_blocks": "blocks",
    "_scales": "exponents",
    "_scale_inv": "scale_inv",
    ".absmax": "absmax",
    ".quant_map": "quant_map",
    ".quant_state": "state",
    ".nested_absmax": "nested_absmax",
    ".nested_quant_map": "nested_quant_map",
    ".nested_offset": "nested_offset",
    ".scb": "SCB",
}
CODES_APART = ("packed", "qweight")  # of one matrix, under a name that is not the weight's
CODES = ("weight", "blocks", *CODES_APART)
SHARED = ("quant_map", "nested_quant_map", "state")
_DEEPEST = max(suffix.count(".") for suffix in PARTS)
_GLUED = tuple(suffix for suffix in STACKED_PARTS if not suffix.startswith("."))


def split_part(name: str) -> tuple[str, str] | None:
    """(name of the weight to which a stored tensor belongs, part); None for a tensor that is not part of a weight."""
    ends, at = [], len(name)
    for _ in range(_DEEPEST):
        if (at := name.rfind(".", 0, at)) < 0:
            break
        ends.append(at)
    for at in reversed(ends):  # the longest suffix first
        if part := PARTS.get(name[at:]):
            return name[:at] + ".weight", part
    if ends and (part := STACKED_PARTS.get(name[ends[0] :])):
        return name[: ends[0]], part
    glued = next((suffix for suffix in _GLUED if name.endswith(suffix)), None) if name.endswith(_GLUED) else None
    return (name[: -len(glued)], STACKED_PARTS[glued]) if glued else None


def weight_of(name: str) -> str:
    """The name of the weight to which a stored tensor belongs."""
    split = split_part(name)
    return split[0] if split else name


def name_of(weight: str, part: str, *, stacked: bool) -> str:
    """The name on disk of a part of a weight; `stacked` if the tensor holds all experts. Raises KeyError for an unknown
    part."""
    if part == "weight":
        return weight
    for suffixes, stem in ((STACKED_PARTS, weight), (PARTS, weight.removesuffix(".weight"))):
        suffix = next((s for s, word in suffixes.items() if word == part), None)
        if suffix is not None and (suffixes is PARTS or stacked):
            return stem + suffix
    raise KeyError(part)


def elements(ref: TensorRef, part: str, *, bits: int | None) -> int:
    """The number of parameters in a stored tensor of an unknown family.

    For a plain tensor it is the number of elements, for the codes of a packed weight the number of codes of `bits` bits
    each, and 0 for the tensors that are only needed to decode. `part` is that of `split_part`, "" for a plain tensor.
    """
    count = math.prod(ref.shape)
    if part in ("", "weight") and ref.dtype not in ("U8", "I32", "U32"):
        return count
    if part == "blocks":
        return 2 * count
    return ref.nbytes * 8 // (bits or 8) if part in ("packed", "weight", "qweight") else 0


# Where config.json may have its quantization_config: at the top, or in the config of the language model of a multimodal
# model. The first one that is there counts, as in transformers.
PLACES: tuple[tuple[str, ...], ...] = ((), ("text_config",))
_KEY = "quantization_config"
_ALSO = "quantization"  # where mlx-lm writes the same settings; its old files have them only there


def quantization(config: Config) -> JsonObject | None:
    """The quantization_config of a config.json, or None."""
    return next((found for place in PLACES if (found := _stated(config, place)) is not None), None)


def with_quantization(config: Config, change: Callable[[JsonObject], JsonObject | None]) -> JsonObject:
    """A copy of a config.json with `change` applied to every quantization_config, which is removed if `change` returns
    None."""
    made = dict(config)
    for place in PLACES:
        if (found := _stated(made, place)) is None:
            continue
        holder = made
        for key in place:
            holder[key] = dict(holder[key])
            holder = holder[key]
        new = change(found)
        for key in [key for key in (_KEY, _ALSO) if holder.get(key) == found]:
            if new is None:
                del holder[key]
            else:
                holder[key] = new
    return made


def _stated(config: Config, place: tuple[str, ...]) -> JsonObject | None:
    at: object = config
    for key in place:
        at = at.get(key) if isinstance(at, Mapping) else None
    if not isinstance(at, Mapping):
        return None
    value, also = at.get(_KEY), at.get(_ALSO)
    if value is None and isinstance(also, dict) and {"group_size", "bits"} <= also.keys():
        value = also
    return dict(value) if isinstance(value, dict) else None


def bits_of(config: Config) -> int | None:
    """Bits per code according to quantization_config; None if it does not state them, or there is none."""
    value = quantization(config)
    try:
        return encodings(value)[0].bits if value is not None else None
    except InputError:
        return None


@dataclass(frozen=True, slots=True)
class Stored:
    """A packed weight: its form, its shape once it is decoded, and {part: name of the tensor}."""

    encoding: Encoding
    shape: Shape
    parts: Mapping[str, str]

    @property
    def how(self) -> JsonObject:
        """The parameters of the decoding kernel, as plain JSON values."""
        form = self.encoding
        return {"form": form.name, "bits": form.bits, "grid": list(form.grid), "shape": list(self.shape)}


def fit(
    weight: str, refs: Mapping[str, TensorRef], shape: Shape, forms: Iterable[Encoding], *, stacked: bool, method: str
) -> Stored:
    """The packed weight in the first of `forms` that matches its tensors; `refs` are these tensors by part.

    Raises InputError if no form matches. The message names the missing, wrong and unexpected parts for the closest one.
    """
    nearest: list[str] | None = None
    for encoding in forms:
        try:
            wanted = parts_of(encoding, shape, stacked=stacked)
        except ValueError:  # a form for matrices only, or for tensors of all experts only
            continue
        wrong = _differences(weight, refs, wanted, stacked=stacked)
        if not wrong:
            return Stored(encoding, shape, {part: ref.name for part, ref in refs.items()})
        if nearest is None or len(wrong) < len(nearest):
            nearest = wrong
    if nearest is None:
        nearest = [f"{escape(weight)!r} of shape {list(shape)} is stored in none of the forms that config.json states"]
    more = f" (and {len(nearest) - 1} more: {'; '.join(nearest[1:4])})" if len(nearest) > 1 else ""
    raise InputError(
        f"{nearest[0]}{more}; according to config.json, weights are quantized by {escape(method)}",
        hint="The checkpoint is incomplete or damaged, or its quantization_config belongs to another checkpoint: "
        "download it again.",
    )


def stated_shape(checkpoint: Checkpoint, stored: Stored) -> object:
    """The shape that a packed weight stores beside its codes; None if it stores none.

    In a tensor that holds all experts it is the shape of one expert's matrix. Reads a few bytes. Raises InputError for
    damaged data.
    """
    if "shape" in stored.parts:
        ref = checkpoint.tensors[stored.parts["shape"]]
        data, size = bytes(checkpoint.read(ref.name)), ref.nbytes // 2
        return [int.from_bytes(data[:size], "little", signed=True), int.from_bytes(data[size:], "little", signed=True)]
    if "state" in stored.parts:
        name = stored.parts["state"]
        fields = parse_json(bytes(checkpoint.read(name)), what=escape(name))
        return fields.get("shape") if isinstance(fields, dict) else "no object"
    return None


def unknown_group(checkpoint: Checkpoint, stored: Stored) -> int | None:
    """A group that a packed weight states for one of its columns but has no scales for; None if there is no such
    column. Reads the groups of all columns."""
    if "g_idx" not in stored.parts:
        return None
    ref, scales = (checkpoint.tensors[stored.parts[part]] for part in ("g_idx", "scales"))
    of_columns = memoryview(bytes(checkpoint.read(ref.name))).cast("i" if ref.dtype == "I32" else "q")
    return next((group for group in of_columns if not 0 <= group < scales.shape[0]), None)


def _differences(weight: str, refs: Mapping[str, TensorRef], wanted: Mapping[str, Part], *, stacked: bool) -> list[str]:
    wrong = []
    for part, want in wanted.items():
        ref = refs.get(part)
        if ref is None:
            if want.needed:
                stem = weight.removesuffix(".weight")
                name = stem + want.suffix if want.suffix else name_of(weight, part, stacked=stacked)
                wrong.append(f"tensor {escape(name)!r} is missing, without which {escape(weight)!r} cannot be decoded")
            continue
        fits = ref.shape in want.shapes or (want.shapes == ANY_LENGTH and len(ref.shape) == 1 and ref.shape[0] > 0)
        if ref.dtype not in want.dtypes or not fits:
            shapes = " or ".join(str(list(s)) for s in want.shapes[:1]) or "one dimension"
            wrong.append(
                f"tensor {escape(ref.name)!r} is {ref.dtype} {list(ref.shape)}, where {want.dtypes[0]} {shapes} is "
                "expected"
            )
    wrong += [f"tensor {escape(refs[part].name)!r} is not expected" for part in refs if part not in wanted]
    return wrong
