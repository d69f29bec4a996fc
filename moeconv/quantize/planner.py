"""The plan of a quantize, with the exact size of every packed tensor. Imports no torch and reads no tensor bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeconv.checkpoint.imatrix import Imatrix, open_imatrix
from moeconv.checkpoint.overlay import Overlay, provenance
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.contract import QuantizeBlock
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.names import module_names
from moeconv.families.served import check_served
from moeconv.options import PlanOptions, QuantizeOptions, check_names, from_keywords, parameters_of, parse_size
from moeconv.plan.arrange import arrange
from moeconv.plan.build import count_planned, parse_dtype
from moeconv.plan.overlay import fingerprint
from moeconv.plan.plan import Plan, Shard
from moeconv.plan.planned import planned_model
from moeconv.quantize.formats import FORMATS, choose_group, choose_scheme, in_place
from moeconv.quantize.layout.required import check_layout, fused_with_layout, layout_for
from moeconv.quantize.left_out import left_out_of, why_left_out
from moeconv.quantize.methods import check_method, check_reads, check_scheme_method
from moeconv.quantize.mixed import USUAL, candidates, check_mixed, offered
from moeconv.quantize.modelfile import modelfile
from moeconv.quantize.packing import Packing, mix
from moeconv.quantize.remote_code import auto_map, remote_code
from moeconv.quantize.rest import rest_of
from moeconv.quantize.scope import WHOLE, choose_scope, in_scope
from moeconv.quantize.spec import MIXED, Asked, Format, Scheme, SchemeInfo
from moeconv.quantize.targets import check_rest, check_targets, loads_beside, loads_by_layer, loads_of
from moeconv.types import JsonObject


def plan_quantize(
    model: Model,
    *,
    overlay: Overlay | None = None,
    inputs: Overlay | None = None,
    importance: Mapping[int, float] | None = None,
    stats_of_twin: str | None = None,
    **parameters: object,
) -> Plan:
    """Plan the packing of every expert. The parameters are the fields of QuantizeOptions and PlanOptions. The experts
    are written in the layout of the format.

    `overlay` has codes that data chose (--method gptq, awq or auto), under their names on disk. Run such a plan with
    `execute(plan, source=model.checkpoint, origins={"overlay": overlay}, out=...)`. `inputs` has the measured scales of
    inputs, for the schemes that store them: origins={"inputs": inputs}. `importance` of every MoE layer
    (`moeconv.calibrate.artifact.layer_importance`) decides the bits of --scheme mixed. `stats_of_twin` is the identity
    of the checkpoint that the importance was measured on, where that is not this one.

    Raises UsageError for parameters that contradict each other, InputError for a model that the format cannot store.
    """
    check_names(parameters, QuantizeOptions, PlanOptions)
    options, common = from_keywords(QuantizeOptions, parameters), from_keywords(PlanOptions, parameters)
    layout = layout_for(model, FORMATS[options.format])
    view = model if layout is None else planned_model(layout, companions=model.checkpoint.path)
    plan = quantize_plan(
        view, options, common, overlay=overlay, inputs=inputs, importance=importance, stats_of_twin=stats_of_twin
    )
    return plan if layout is None else fused_with_layout(layout, plan)


def quantize_plan(
    model: Model, options: QuantizeOptions, common: PlanOptions, *, overlay: Overlay | None = None,
    inputs: Overlay | None = None, importance: Mapping[int, float] | None = None, stats_of_twin: str | None = None,
) -> Plan:  # fmt: skip
    """`plan_quantize` with the parameters as option groups."""
    format = FORMATS[options.format]
    check_mixed(options, format, importance)
    mixed = options.scheme == MIXED
    check_method(format, options.method)
    check_reads(options, common, format)
    info = choose_scheme(format, scheme=None if mixed else options.scheme, bits=None if mixed else options.bits)
    if not mixed:
        check_scheme_method(format, info, options.method)
    imatrix = _imatrix(options, format)
    if format.shard is None and options.file_name != QuantizeOptions().file_name:
        raise UsageError(f"--format {format.name} does not use --file-name", hint="Use --format gguf.")
    options = replace(options, scope=choose_scope(model, format, info, options.scope))
    warnings = check_targets(
        format, info.name, options.target, family=model.family, mixed=mixed, hidden=model.hidden_size
    ) + check_served(model.family.model_type, options.target)
    if model.family.only_served and format.shard is None:
        warnings = [*warnings, _only_served(model)]
    _check_source(model, format)
    if format.shard is None:  # other files than safetensors store experts in their own way
        check_layout(model, format, options.method)
    left_out = left_out_of(model, format)
    weights = [ref for ref in in_scope(model, str(options.scope), format) if ref.name not in left_out]
    _check_weights(model, weights)
    _check_nesting(options, format, info)
    widths = list(dict.fromkeys(ref.shape[-1] for ref in weights))
    group = choose_group(format, info, options.group_size, widths)
    scheme = Scheme(info.name, info.bits, group, options.double_quant)
    for ref in weights:
        format.check(ref, scheme)
    rest = rest_of(model, options, format, weights)
    weights += [] if rest is None else rest.weights
    dtype = parse_dtype(common.dtype)
    packing = Packing(
        model, format, scheme, dict.fromkeys(model.moe_layers, scheme), weights, options.method, dtype, overlay, rest
    )
    if rest is not None:
        warnings += check_rest(format, scheme.name, rest.scheme.name, options.target, family=model.family)
    if mixed and not left_out:
        _check_no_drafting(model)
    if mixed and format.mix is None:
        size = None if options.group_size == "auto" else group
        offers = [candidates(format, widths, names, group=size) for names in offered(format, options.among)]
        packing = mix(packing, offers, importance or {}, options=options, common=common)
        warnings = [*warnings, *_doubtful(packing, options, warnings)]
    if format.shard is not None:
        size = parse_size(options.split_size, flag="--split-size")
        whole = options.scope == WHOLE
        beside = {} if rest is None else dict.fromkeys(rest.names, rest.scheme)
        asked = Asked(model, weights, scheme, dtype, whole, imatrix, size, options.file_name, beside)
        if mixed and format.mix is not None:
            asked = format.mix(asked, offered(format, options.among), importance or {}, options)
            packing = replace(packing, by_layer={}, types=asked.types)
        shards, notes = format.shard(asked)
        config, warnings = with_head(model), [*warnings, *notes]
        warnings += why_left_out(model, left_out)
        promise = _promise(model, shards)
    else:
        shards = arrange(packing.items(), common, model.family)
        config = packing.config(_ignored(model, {r.name for r in weights}), scope=str(options.scope))
        promise = packing.parts()
    items = [item for shard in shards for item in shard.items]
    texts = _code_of_loader(model, format, config) if options.self_contained else {}
    texts |= modelfile(model, format, shards) if options.modelfile else {}
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    of_twin = {} if stats_of_twin is None else {"stats_of_twin": stats_of_twin}
    return Plan(
        command="quantize",
        parameters=_parameters(options, common, imatrix) | _evidence(model, importance, of_twin, overlay, inputs),
        identity=model.identity,
        config=config,
        shards=shards,
        params_total=total,
        params_active=active,
        block=_block(packing, options, stats_of_twin),
        warnings=(*model.warnings, *head_warnings(model), *warnings),
        dropped=(*model.dropped, *left_out),
        texts=texts,
        promise=promise,
    )


def _imatrix(options: QuantizeOptions, format: Format) -> Imatrix | None:
    """The importance matrix that was asked for. Raises UsageError for a format that has no use for it."""
    if options.imatrix is None:
        return None
    if format.covers is None:
        raise UsageError(f"--format {format.name} does not use --imatrix", hint="Use --format gguf.")
    return open_imatrix(options.imatrix)


def _parameters(options: QuantizeOptions, common: PlanOptions, imatrix: Imatrix | None) -> JsonObject:
    """The parameters of the plan, with the content of the importance matrix in place of its path."""
    found = parameters_of(options, common)
    del found["imatrix"], found["split_size"], found["modelfile"], found["file_name"]  # the plan has the files
    return found if imatrix is None else found | {"imatrix": imatrix.sha256}


def _doubtful(packing: Packing, options: QuantizeOptions, known: Sequence[str]) -> list[str]:
    """The warnings about targets that were not proven to load the narrow or unusual schemes that some layers have."""
    format, family = packing.format, packing.model.family
    unusual = (s.name for s in packing.by_layer.values() if s.bits < USUAL or s.name not in format.mixes)
    found = [w for name in dict.fromkeys(unusual) for w in check_targets(format, name, options.target, family=family)]
    return [warning for warning in found if warning not in known]


def _only_served(model: Model) -> str:
    readers, model_type = model.family.tensors.readers, model.family.model_type
    if model.packed_experts:
        return f"the experts are stacked as {readers} reads them; transformers does not load the result"
    return (
        f"the experts are written one by one, as {readers} reads the codes of a {model_type}; its class in "
        "transformers stacks them and does not load the result, for which --format bitsandbytes is"
    )


def _evidence(
    model: Model, importance: Mapping[int, float] | None, of_twin: Mapping[str, str], overlay: Overlay | None,
    inputs: Overlay | None,
) -> dict[str, object]:  # fmt: skip
    """The parameters by which the plan's id depends on what was measured for it."""
    stats = {"stats": None if importance is None else _hash_of(importance)}
    scales = {} if inputs is None else {"inputs": _made_with(model, inputs)}
    return stats | dict(of_twin) | ({} if overlay is None else _made_with(model, overlay)) | scales


def _block(packing: Packing, options: QuantizeOptions, stats_of_twin: str | None) -> QuantizeBlock:
    """The block of the result's JSON."""
    format, scheme, by_layer = packing.format, packing.scheme, packing.by_layer
    mixed = options.scheme == MIXED
    block: QuantizeBlock = {
        "format": format.name,
        "scheme": MIXED if mixed else scheme.name,
        "method": options.method,
        "group_size": None if mixed else scheme.group,
        "bits_by_layer": {str(layer): s.bits for layer, s in by_layer.items()},
        "scheme_by_layer": {str(layer): s.name for layer, s in by_layer.items()},
        "group_size_by_layer": {str(layer): s.group for layer, s in by_layer.items()},
        "scope": str(options.scope),
        "double_quant": scheme.nested,
        "loads": _loads(packing, mixed=mixed),
    }
    if packing.types:
        block["scheme_by_tensor"] = dict(packing.types)
    if packing.rest is not None:
        block["rest"] = {"scheme": packing.rest.scheme.name, "group_size": packing.rest.scheme.group}
    if stats_of_twin is not None:
        block["stats_of_twin"] = stats_of_twin
    return block


def _loads(packing: Packing, *, mixed: bool) -> dict[str, str]:
    format, name, family = packing.format, packing.scheme.name, packing.model.family
    if packing.rest is not None:
        return loads_beside(format, name, packing.rest.scheme.name, family, mixed=mixed)
    if mixed:
        return loads_by_layer(format, dict.fromkeys(s.name for s in packing.by_layer.values()), family)
    return loads_of(format, name, family)


def _check_source(model: Model, format: Format) -> None:
    """Raises InputError for a source that is quantized already, and for one without experts where the format is for
    experts."""
    if model.quantization:
        stored = model.quantization.get("quant_method")
        raise InputError(
            f"the source is quantized already ({escape(stored)})",
            hint="Quantize the checkpoint that it was made from, or pass --requantize to decode the source first.",
        )
    if format.dense:
        return
    if model.family.kind != "moe":
        raise InputError(
            f"{model.family.model_type} has no experts to quantize", hint="Make it an MoE first: moeconv upcycle."
        )
    if not model.moe_layers:
        raise InputError("config.json has no Mixture-of-Experts layer", hint="There are no experts to quantize.")


def _check_nesting(options: QuantizeOptions, format: Format, info: SchemeInfo) -> None:
    """Raises UsageError for --double-quant with a scheme whose scales cannot be quantized."""
    if options.double_quant and not info.nests:
        fits = ", ".join(f"{f.name} {other.name}" for f in FORMATS.values() for other in f.schemes if other.nests)
        raise UsageError(f"{format.name} {info.name} does not support --double-quant", hint=f"Use it with {fits}.")


def _check_no_drafting(model: Model) -> None:
    """Raises InputError for bits by layer in a model with multi-token-prediction layers, for which the loaders have no
    such setting."""
    if model.mtp_layers:
        raise InputError(
            "bits that differ by layer cannot be written for the multi-token-prediction layers "
            f"{list(model.mtp_layers)}",
            hint=f"Use one scheme for all layers with --format {' or '.join(f.name for f in in_place())}.",
        )


def _code_of_loader(model: Model, format: Format, config: JsonObject) -> dict[str, str]:
    """The files of code, by name, that load the result without moeconv. The key that names their classes is added to
    `config`."""
    if not format.remote_code:
        raise UsageError(
            f"--format {format.name} does not need --self-contained",
            hint="Leave it out: stock runtimes load the result.",
        )
    if model.family.remote is not None:
        raise InputError(
            f"--self-contained needs a class of transformers, and that of {model.family.model_type} is code in the "
            "checkpoint",
            hint="Leave it out.",
        )
    if model.family.multimodal.beside:
        raise InputError(
            f"--self-contained does not support multimodal models such as {model.family.model_type}",
            hint="Leave it out. After `import moeconv.hf`, transformers loads the result.",
        )
    texts = remote_code(model.family.architecture, loader=format.remote_code)
    config["auto_map"] = config.get("auto_map", {}) | auto_map(model.family.architecture)
    return texts


def _hash_of(importance: Mapping[int, float]) -> str:
    """The hash in the manifest that stands for the statistics, whose path has no meaning on another machine."""
    return hashlib.sha256(json.dumps({str(at): x for at, x in importance.items()}, sort_keys=True).encode()).hexdigest()


def _made_with(model: Model, overlay: Overlay) -> dict[str, object]:
    """The content and the provenance of an overlay. Raises InputError for one that was made for another checkpoint."""
    made_with = provenance(
        overlay,
        identity=model.identity,
        checkpoint=model.checkpoint,
        hint="Choose the codes again for this checkpoint.",
    )
    return {"overlay": fingerprint(overlay), "made_with": made_with}


def _promise(model: Model, shards: Sequence[Shard]) -> dict[str, int]:
    """The number of tensors that files of another kind pack, per role. Those of the experts are counted from the
    geometry of the layers, and not from the tensors that were found."""
    changed = [item for shard in shards for item in shard.items if item.changed]
    groups = [item.changed for item in changed]
    counts = {group: groups.count(group) for group in sorted(set(groups))}
    matrices = {item.outputs[0].role for item in changed if item.changed == "expert"}
    experts = len(model.moe_layers) * model.num_experts * len(matrices)
    return counts | ({"expert": experts} if experts else {})


def _check_weights(model: Model, weights: list[TensorRef]) -> None:
    """Raises InputError for a weight that is not a matrix of floats, or a stack of such matrices."""
    for ref in weights:
        layout = model.family.tensors.packed.get(model.roles[ref.name].key)
        matrix = len(ref.shape) == (2 if layout is None or layout.flat else 3)
        if ref.dtype not in ("BF16", "F16", "F32") or not matrix:
            raise InputError(
                f"tensor {escape(ref.name)!r} is {ref.dtype} {list(ref.shape)}, not a matrix of 16 or 32 bit floats",
                hint="Quantize a bf16, fp16 or fp32 checkpoint.",
            )


def _ignored(model: Model, quantized: set[str]) -> list[str]:
    """The modules whose matrix is not packed, for the list of quantization_config that loaders skip."""
    names: list[str] = []
    for name, ref in model.checkpoint.tensors.items():
        role = model.roles.get(name)
        matrix = role is not None and name.endswith(".weight") and len(ref.shape) == 2
        if matrix and name not in quantized and name != model.family.name("embedding.tokens"):
            names += module_names(name, model.family)  # transformers has its own names for some modules
    names += _shared_values(model)
    if "lm_head" not in names:
        names.append("lm_head")
    return names


def _shared_values(model: Model) -> list[str]:
    """The modules of values in layers whose keys are the values too (gemma4). vLLM fuses queries, keys and values, and
    refuses a fused module unless all three are in the list."""
    keys, values = ({r.layer for r in model.roles.values() if r.key == f"attention.{part}"} for part in "kv")
    lacking = sorted(layer for layer in keys - values if layer is not None)
    if not model.family.has("attention.v"):
        return []
    return [m for at in lacking for m in module_names(model.family.name("attention.v", layer=at), model.family)]
