"""The model card, README.md of every output: the hub's metadata, the steps, how to load the model, what was measured.

The manifest does not include it, so that people may edit it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moeconv import __version__
from moeconv.checkpoint.card import parent_names, source_metadata
from moeconv.checkpoint.paths import hub_name
from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import escape
from moeconv.families.registry import tables
from moeconv.plan.plan import Plan
from moeconv.quantize.formats import FORMATS
from moeconv.report.history import command_line
from moeconv.types import Config, JsonObject
from moeconv.units import counted, human_bytes, human_count
from moeconv.upcycle.methods import METHODS

_TAGS = {"upcycle": "upcycled", "prune": "pruned", "quantize": "quantized", "tune": "tuned"}


def model_card(
    plan: Plan, source: Checkpoint, steps: Sequence[Config], found: Config, siblings: Sequence[Checkpoint] = ()
) -> bytes:
    """README.md of an output, in UTF-8.

    `siblings` are further checkpoints that experts come from. `steps` are the steps in the manifest, the last of which
    is that of this plan; `found` is what the check of the written model measured. The text depends neither on times nor
    on paths.
    """
    import yaml

    meta = yaml.safe_dump(_metadata(plan, source, steps, siblings), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{meta}---",
        f"# {_title(plan, source)}",
        _what(plan),
        "## What was done",
        _done(steps),
        "## How to load it",
        _loading(plan),
    ]
    if measured := _measured(plan, found):
        sections += ["## Measured", measured]
    if plan.warnings or _caveats(plan):
        sections += ["## Caveats", "\n".join(f"- {escape(text)}" for text in (*_caveats(plan), *plan.warnings))]
    sections.append(
        f"Made with moeconv {__version__}. `moeconv_manifest.json` holds every parameter, the fingerprint of the "
        "source and the hash of every file; `moeconv verify` checks them."
    )
    return ("\n\n".join(sections) + "\n").encode()


# -- metadata ----------------------------------------------------------------------------------------------------------


def _metadata(
    plan: Plan, source: Checkpoint, steps: Sequence[Config], siblings: Sequence[Checkpoint]
) -> JsonObject:  # fmt: skip
    theirs = source_metadata(source)
    bases = [name for parent in (source, *siblings) for name in parent_names(parent)]
    meta: JsonObject = {}
    if bases := list(dict.fromkeys(bases)):
        meta["base_model"] = bases[0] if len(bases) == 1 else bases
        meta["base_model_relation"] = _relation(steps)
    carried = ("license", "license_name", "license_link", "language", "datasets")
    meta |= {key: theirs[key] for key in carried if key in theirs}
    done = {str(step.get("command")) for step in steps}
    meta["library_name"] = "gguf" if plan.gguf else "transformers"
    meta["pipeline_tag"] = "text-generation"
    tags = ["moe", "mixture-of-experts", "moeconv", *(tag for word, tag in _TAGS.items() if word in done)]
    old = theirs.get("tags", [])
    meta["tags"] = list(dict.fromkeys([*tags, *([old] if isinstance(old, str) else old)]))
    return meta


def _relation(steps: Sequence[Config]) -> str:
    """The hub's word for how the output relates to the base model: "quantized" if no other step was run."""
    commands = {str(step.get("command")) for step in steps}
    methods = {
        str(parameters.get("method")) for step in steps if isinstance(parameters := step.get("parameters"), dict)
    }
    if any(name in METHODS and METHODS[name].siblings == "must" for name in methods):
        return "merge"
    return "quantized" if commands == {"quantize"} else "finetune"


# -- text --------------------------------------------------------------------------------------------------------------


def _title(plan: Plan, source: Checkpoint) -> str:
    name = hub_name(source.path)
    what = {"upcycle": "as a Mixture-of-Experts", "prune": "with fewer experts", "quantize": "with packed experts",
            "tune": "with a tuned router" if plan.params_active < plan.params_total else "with tuned FFNs",
            "arrange": "with its experts in another order",
            "collapse": "as a dense model"}.get(plan.command, "converted")  # fmt: skip
    return f"{name} {what}" if name else f"{plan.config.get('model_type', 'model')} {what}"


def _what(plan: Plan) -> str:
    size = f"{human_count(plan.params_total)} parameters, {human_count(plan.params_active)} active per token"
    packed = f" Packed as {plan.block['format']} {plan.block['scheme']}." if plan.block.get("scheme") else ""
    return f"{size}, {plan.tensors} tensors, {human_bytes(plan.nbytes)}. Architecture: {_architecture(plan)}.{packed}"


def _architecture(plan: Plan) -> str:
    names = plan.config.get("architectures")
    return f"`{escape(names[0])}`" if isinstance(names, list) and names else escape(plan.config.get("model_type"))


def _done(steps: Sequence[Config]) -> str:
    rows = ["| step | parameters | active |", "|---|---|---|"]
    for step in steps:
        counts = (step.get(f"{kind}_parameters") for kind in ("total", "active"))
        total, active = (human_count(n) if isinstance(n, int) else "-" for n in counts)
        rows.append(f"| `{command_line(step).replace('|', '/').replace('`', '')}` | {total} | {active} |")
    return "\n".join(rows)


def _loading(plan: Plan) -> str:
    loads = plan.block.get("loads")
    name = plan.block.get("format")
    format = None if name is None else FORMATS.get(name)
    first = f"{format.imports}\n" if format is not None and format.imports else ""
    auto = (
        "AutoModelForImageTextToText" if plan.config.get("model_type") in tables().wrapped else "AutoModelForCausalLM"
    )
    code = (
        f"```python\n{first}from transformers import {auto}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'model = {auto}.from_pretrained("PATH", dtype="auto")\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n```"
    )
    parts = []
    if not isinstance(loads, Mapping) or loads.get("transformers") in ("ok", "dequantized"):
        note = (
            " (experts are expanded to the model's dtype in memory)"
            if _loads_as(loads, "transformers", "dequantized")
            else ""
        )
        parts.append(f"transformers{note}:\n\n{code}")
    if _loads_as(loads, "vllm", "ok"):
        parts.append("vLLM:\n\n```sh\nvllm serve PATH\n```")
    if _loads_as(loads, "sglang", "ok"):
        parts.append("SGLang:\n\n```sh\npython -m sglang.launch_server --model-path PATH\n```")
    if _loads_as(loads, "llama.cpp", "ok"):
        parts.append(f"llama.cpp:\n\n```sh\nllama-cli -m PATH/{plan.shards[0].name}\n```")
    return "\n\n".join(parts)


def _loads_as(loads: object, runtime: str, word: str) -> bool:
    return isinstance(loads, Mapping) and loads.get(runtime) == word


def _measured(plan: Plan, found: Config) -> str:
    lines = []
    check = found.get("equivalence")
    if isinstance(check, Mapping) and check.get("checked"):
        promise = "promised exact" if plan.block.get("exact") else "not exact by design"
        lines.append(
            f"- Logits differ from the source's by at most {_ceiling(check['relative'])} of their spread "
            f"({check['tokens']} tokens; {promise})."
        )
    error = found.get("error")
    if isinstance(error, Mapping) and isinstance(rms := error.get("relative_rms"), Mapping):
        lines.append(
            f"- Decoded weights against the source's: relative RMS error {rms['mean']:.3f} mean, {rms['max']:.3f} max."
        )
    lines += _pruned(plan, found)
    if plan.command == "upcycle" and isinstance(cost := found.get("measured"), Mapping):
        lines.append(
            f"- Loss on text: {_nats(cost['reference_loss'])} -> {_nats(cost['loss'])} nats per token "
            f"({cost['tokens']} tokens); {cost['new_share']:.1%} of the experts that tokens choose are new."
        )
    for name, unit in (
        ("loss", "nats per token"),
        ("kl", "nats per token, KL to the teacher"),
        ("error", "layer error"),
    ):
        before, after = found.get(f"{name}_before"), found.get(f"{name}_after")
        if isinstance(before, float) and isinstance(after, float):
            lines.append(f"- Tuning: {before:.4f} -> {after:.4f} {unit}, on text held out from it.")
    return "\n".join(lines)


def _pruned(plan: Plan, found: Config) -> list[str]:
    """How experts were removed, and the measured effect."""
    block = plan.block
    before, after = block.get("experts_before"), block.get("experts_after")
    if not (isinstance(before, int) and isinstance(after, int)) or before == after:
        return []
    lines = [f"- {after} of {before} experts per layer remain, chosen by {escape(block.get('criterion'))}."]
    cost, refit = found.get("measured"), found.get("refit")
    if isinstance(cost, Mapping):
        lines.append(
            f"- Loss on held-out text: {cost['reference_loss']:.4f} -> {cost['loss']:.4f} nats per token "
            f"(KL {cost['kl']:.4f}, {cost['tokens']} tokens)."
        )
    if isinstance(refit, Mapping) and isinstance(layers := refit.get("layers"), Sequence):
        lines.append(f"- The remaining experts were refitted in {counted(len(layers), 'layer')}.")
    return lines


def _caveats(plan: Plan) -> list[str]:
    if plan.command == "upcycle" and not plan.block.get("exact"):
        return ["The conversion changes the model's function on purpose: train it before use."]
    return []


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _ceiling(value: float) -> str:
    """One significant digit, rounded up: the same on machines whose last bits differ."""
    if not math.isfinite(value) or value <= 0:
        return f"{value:g}"
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.0e}" if value < 0.01 else f"{math.ceil(value / unit) * unit:g}"
