"""What people see: a short table per result, with figures and without judgement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from moeconv.errors import escape
from moeconv.units import counted, human_bytes, human_count, human_seconds

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from moeconv.contract import (
        ArrangeBlock,
        Calibrated,
        CollapseBlock,
        Curve,
        Evaluated,
        Figure,
        Foreseen,
        ImportBlock,
        Inspected,
        PruneBlock,
        Pruned,
        QuantizeBlock,
        Tasks,
        TuneBlock,
        UpcycleBlock,
        Verified,
        Written,
    )
    from moeconv.report.types import ReportResult
    from moeconv.types import JsonObject


def pairs(rows: Mapping[str, object]) -> Table:
    """Two columns: a word and its value. Rows whose value is None are left out."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        if value is not None:
            table.add_row(key, escape(value))
    return table


def grid(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; columns of numbers are right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numbers = i > 0 and any(str(row[i])[:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def written(result: Written) -> list[Table]:
    """The result of a step that writes a checkpoint."""
    block = _block(result)
    parameters = result["parameters"]
    rows: dict[str, object] = {
        "output": result["output"] + (" (dry run: nothing written)" if result["dry_run"] else ""),
        "parameters": f"{human_count(parameters['total'])} total, {human_count(parameters['active'])} active per token",
        "size": f"{human_bytes(result['bytes'])} in {result['shards']} file{'s' * (result['shards'] != 1)}",
        "changed": ", ".join(counted(n, f"{role} tensor") for role, n in result["changed"].items()) or "nothing",
    }
    rows |= _BLOCKS[result["command"]](block)
    if result.get("complete") is False:
        rows["part"] = f"{result['part']} is done, others are not"
    if memory := result.get("memory"):
        rows["memory"] = f"{human_bytes(memory['peak_bytes'])}, at least {human_bytes(memory['least_bytes'])}"
    if not result["dry_run"]:
        rows["time"] = f"{human_seconds(result['seconds'])}, peak memory {human_bytes(result['peak_rss_bytes'])}"
    if not result["dry_run"] and result.get("complete") is not False:
        rows["to share"] = f"hf upload OWNER/NAME {result['output']}"
    tables = [pairs(rows)]
    if result["command"] == "tune" and block.get("layers"):
        tables.append(_tune_layers(block))
    return tables


def _block(result: Written) -> JsonObject:
    """The block that the command adds under its own name. `_BLOCKS` has the function that knows its type."""
    block = result.get(result["command"], {})
    return block if isinstance(block, dict) else {}


def _is_curve(result: Pruned | Curve) -> TypeGuard[Curve]:
    return "curve" in result


def pruned(result: Pruned | Curve) -> list[Table]:
    """A pruned checkpoint, or the curve over all ratios."""
    if not _is_curve(result):
        return written(cast("Pruned", result))
    mixed = any("width" in r for r in result["curve"])
    columns = ["removed", "experts", *["neurons"] * mixed, "size", "loss", "increase", "KL", "keep set stable"]
    rows = [
        [f"{r['ratio']:.1%}", r["experts"], *[r.get("width")] * mixed, human_bytes(r["bytes"]), f"{r['loss']:.4f}",
         f"{r['loss_increase']:+.4f}",
         f"{r['kl']:.4f}", "-" if r["stability"] is None else f"{r['stability']:.0%}"]
        for r in result["curve"]
    ]  # fmt: skip
    about = {
        "criterion": result["criterion"] + (" with refit" if result["refit"] else ""),
        "unpruned loss": f"{result['reference_loss']:.4f} over {counted(result['tokens'], 'token')}",
        "written to": result["output"],
    }
    return [pairs(about), grid(columns, rows)]


def _upcycle(block: UpcycleBlock) -> dict[str, str]:
    check = block.get("equivalence")
    rows = {
        "conversion": f"{block['from']} -> {block['to']}, {counted(block['num_experts'], 'expert')}, "
        f"top-{block['top_k']}, "
        f"method {block['method']}",
    }
    if check and check["checked"]:
        exact = "promised exact" if block["exact"] else "not exact by design"
        rows["against source"] = (
            f"logits differ by at most {check['max_abs_logit_diff']:.2e} "
            f"({check['relative']:.2e} of their spread, {check['tokens']} tokens; {exact})"
        )
    if "measured" in block:
        found = block["measured"]
        rows["loss"] = f"{_number(found['reference_loss'])} -> {_number(found['loss'])} ({found['tokens']} tokens)"
        rows["new experts"] = f"{found['new_share']:.1%} of the experts that tokens choose"
    return rows


def _prune(block: PruneBlock) -> dict[str, str]:
    by = f", by {block['criterion']}" if block["criterion"] else ""
    rows, each = {}, "FFN"
    if block["experts_before"]:
        rows, each = {"experts": f"{block['experts_before']} -> {block['experts_after']} per layer{by}"}, "expert"
    if "width_after" in block:
        rows["width"] = f"{block['width_before']} -> {counted(block['width_after'], 'neuron')} per {each}"
    if "shared_width_after" in block:
        rows["shared width"] = f"{block['shared_width_before']} -> {counted(block['shared_width_after'], 'neuron')}"
    for tried in block.get("mix", []):
        word = f"{tried['experts']} x {tried['width']}"
        cost = f"{human_bytes(tried['bytes'])}, {tried['loss_increase']:+.4f} loss"
        rows[f"mix {word}"] = cost + (", chosen" if tried["chosen"] else "")
    if "top_k_after" in block:
        rows["top-k"] = f"{block['top_k_before']} -> {block['top_k_after']}"
    if "measured" in block:
        found = block["measured"]
        rows["loss"] = (
            f"{found['loss']:.4f}, {found['loss_increase']:+.4f} against the unpruned model, KL {found['kl']:.4f} "
            f"({found['tokens']} tokens)"
        )
    if "distill" in block:
        trained = block["distill"]
        change = f"{_number(trained['kl_before'])} -> {_number(trained['kl_after'])}"
        rows["distilled"] = f"{counted(trained['steps'], 'step')}, held-out KL {change}"
    pruned = block["experts_after"] < block["experts_before"]
    for layer, kept in ((block.get("keep") or {}) if pruned else {}).items():
        rows[f"layer {layer}"] = "keeps " + ", ".join(map(str, kept))
    return rows


def _quantize(block: QuantizeBlock) -> dict[str, str]:
    group = f", {block['group_size']} weights per scale" if block.get("group_size") else ""
    rest = f", the rest in {block['rest']['scheme']}" if "rest" in block else ""
    rows = {"packing": f"{block['format']} {block['scheme']}{group}{rest}, method {block['method']}"}
    if error := block.get("error", {}).get("relative_rms"):  # of a sample that the check decoded
        rows["error"] = f"relative RMS {error['mean']:.4f} mean, {error['max']:.4f} max (decoded sample)"
    rows["loads in"] = ", ".join(f"{name}: {how}" for name, how in block["loads"].items())
    return rows


def _tune(block: TuneBlock) -> dict[str, str]:
    rows = {"objective": f"{block['objective']}, {counted(block['steps'], 'step')}"}
    # a dry run has none of them
    changes = {
        "loss": (block.get("loss_before"), block.get("loss_after")),
        "kl": (block.get("kl_before"), block.get("kl_after")),
        "error": (block.get("error_before"), block.get("error_after")),
    }
    for name, (before, after) in changes.items():
        if before is not None:
            rows[name] = f"{_number(before)} -> {_number(after)}"
    return rows


def _tune_layers(block: JsonObject) -> Table:
    """One row per layer, on held-out tokens before -> after; with the error where the objective has one per layer."""
    columns = {"error": ("error", 4), "router entropy": ("entropy", 3), "max/mean load": ("max_over_mean", 2)}
    layers = block.get("layers", [])
    if not any("error" in r for r in layers):
        del columns["error"]

    def change(r: JsonObject, key: str, digits: int) -> str:
        return f"{_number(r['before'][key], digits)} -> {_number(r[key], digits)}"

    rows = [[r["layer"], *(change(r, *column) for column in columns.values()), change(r, "dead", 0)] for r in layers]
    return grid(["layer", *columns, "dead experts"], rows)


def _import(block: ImportBlock) -> dict[str, str]:
    types = ", ".join(f"{escape(name)} {count}" for name, count in block["types"].items())
    return {"from": f"{escape(block['architecture'])} ({types})", "dtype": block["dtype"]}


def _arrange(block: ArrangeBlock) -> dict[str, str]:
    rows = {"shares": f"{block['devices']} of equal size"}
    for words, before, after in (
        ("", block["before"], block["after"]),
        (", held-out text", block.get("held_out_before"), block.get("held_out_after")),
    ):
        if before is not None and after is not None:
            rows[f"max/mean load{words}"] = (
                f"{_number(before['max_over_mean'], 3)} -> {_number(after['max_over_mean'], 3)} (worst layer "
                f"{_number(before['worst'], 3)} -> {_number(after['worst'], 3)})"
            )
            rows[f"pairs across shares{words}"] = f"{_number(before['crossing'], 3)} -> {_number(after['crossing'], 3)}"
    return rows


def _collapse(block: CollapseBlock) -> dict[str, str]:
    experts = (
        f"{counted(block['experts_before'], 'expert')} of {counted(block['expert_width'], 'neuron')}, "
        f"top-{block['top_k_before']}"
    )
    shared = f", and {block['shared_width']} shared" if block["shared_width"] else ""
    rows = {
        "family": f"{block['from']} -> {block['to']}",
        "FFN": f"{experts}{shared} -> {counted(block['width'], 'neuron')}",
    }
    layers = block.get("layers") or []
    errors = [error for row in layers if (error := row["error"]) is not None]
    if errors:
        rows["error of the FFNs"] = f"{sum(errors) / len(errors):.3f} of their output, on held-out tokens"
    return rows


# command -> the rows of its own block
_BLOCKS: Mapping[str, Callable[[Any], dict[str, str]]] = {
    "upcycle": _upcycle, "prune": _prune, "quantize": _quantize, "tune": _tune, "import": _import,
    "arrange": _arrange, "collapse": _collapse,
}  # fmt: skip


def inspected(result: Inspected) -> list[Table]:
    """A checkpoint."""
    parameters = result["parameters"]
    moe, count = result["kind"] == "moe", parameters["active"]
    names = ", ".join(word for word in (result["kind"] or "unknown", result["architecture"]) if word)
    active = "" if count is None else f", {human_count(count)} active per token"
    rows = {
        "family": f"{result['model_type']} ({names})",
        "parameters": None if parameters["total"] is None else f"{human_count(parameters['total'])} total{active}",
        "prediction": f"{human_count(parameters['prediction'])} more in layers {result['mtp_layers']}"
        if parameters["prediction"] else None,
        "layers": None if result["layers"] is None else
        f"{result['layers']}" + (f", {len(result['moe_layers'] or ())} with experts" if moe else ""),
        "experts": f"{result['num_experts']} per layer, top-{result['top_k']}" if moe else None,
        "FLOPs per token": None if result["flops_per_token"] is None else human_count(result["flops_per_token"]),
        "size": f"{human_bytes(result['bytes'])}, {counted(result['tensors'], 'tensor')}, "
        f"{counted(result['shards'], 'shard')}",
        "dtypes": ", ".join(f"{d} {human_bytes(n)}" for d, n in result["dtypes"].items()),
        "quantization": None,
    }  # fmt: skip
    if result["quantization"]:
        q = result["quantization"]
        bits = f", {q['bits']} bits" if q["bits"] else ""
        rows["quantization"] = f"{q['format']}{bits}" + (f" ({q['scheme']})" if q["scheme"] else "")
    roles = result["parameters_by_role"]
    by_role = [[r, human_count(n), human_bytes(result["bytes_by_role"].get(r, 0))] for r, n in roles.items()]
    return [pairs(rows), *([grid(["role", "parameters", "bytes"], by_role)] if by_role else [])]


def _foreseen(result: Foreseen) -> list[Table]:
    """A dry run of a command that only measures."""
    memory = result["memory"]
    rows = {"memory": f"{human_bytes(memory['peak_bytes'])}, at least {human_bytes(memory['least_bytes'])}; "
                      f"{human_bytes(memory['free_bytes'])} are free"}  # fmt: skip
    return [pairs(rows | {"tokens": f"{memory['tokens']} (dry run: nothing was run)"})]


def evaluated(result: Evaluated | Foreseen) -> list[Table]:
    """Loss, comparison with the reference, and gates."""
    if "dry_run" in result:
        return _foreseen(cast("Foreseen", result))
    reference, answered = result["reference"], result.get("tasks")
    rows: dict[str, object] = {}
    if result["sources"] or "tasks" not in result:
        rows["tokens"] = result["tokens"]
        rows["loss"] = f"{_number(result['loss'])} nats per token, perplexity {_number(result['perplexity'], 3)}"
    if reference:
        rows["reference"] = f"{_number(reference['loss'])} nats, perplexity {_number(reference['perplexity'], 3)}"
        rows["KL"] = f"{_number(result['kl'])} nats"
        rows["same top-1"] = f"{100 * (result['top1_agreement'] or 0):.2f} %"
    if result["tokens_per_second"] is not None:
        rows["speed"] = f"{result['tokens_per_second']:.0f} tokens/s"
    if answered:
        rows |= _accuracies(answered)
    tables = [pairs(rows)]
    if result.get("sources"):
        rows_by_source = [[s["name"], s["tokens"], _number(s["loss"])] for s in result["sources"]]
        tables.append(grid(["source", "tokens", "loss"], rows_by_source))
    if answered:
        tables.append(_task_table(answered))
    if result.get("gates"):
        gates = [
            [name, _number(g["value"], 5), _number(g["limit"], 5), "passed" if g["passed"] else "FAILED"]
            for name, g in result["gates"].items()
        ]
        tables.append(grid(["gate", "value", "limit", ""], gates))
    return tables


def _accuracies(answered: Tasks) -> dict[str, object]:
    rows: dict[str, object] = {"choices": f"{answered['choices']}, {answered['tokens_per_second']:.0f} tokens/s"}
    if answered["accuracy"]:
        rows["mean accuracy"] = _share(answered["accuracy"])
    if change := answered.get("accuracy_change"):
        low, high = (_number(change[key], 4) for key in ("low", "high"))
        rows["change"] = f"{_number(change['value'], 4)} against the reference (95 %: {low} to {high})"
    return rows


def _task_table(answered: Tasks) -> Table:
    rows: list[list[object]] = []
    for task in answered["results"]:
        theirs = task.get("reference", {})
        for name, figure in task["metrics"].items():
            other = [_number(theirs[name]["value"], 4)] if name in theirs else []
            rows.append([task["name"], task["questions"], name, _share(figure), *other])
    compared = ["reference"] if "reference_accuracy" in answered else []
    return grid(["task", "questions", "metric", "value", *compared], rows)


def _share(figure: Figure) -> str:
    """A mean with its standard error."""
    return f"{_number(figure['value'], 4)} ± {_number(figure['stderr'], 4)}"


def calibrated(result: Calibrated | Foreseen) -> list[Table]:
    """What a statistics file was made of, and the load per layer."""
    if "dry_run" in result:
        return _foreseen(cast("Foreseen", result))
    rows = {"output": result["output"], "tokens": result["tokens"]}
    halves, loads = list[list[object]](), list[list[object]]()
    for r in result["layers"]:
        if "entropy" in r:
            loads.append([r["layer"], _number(r["entropy"], 3), _number(r["max_over_mean"], 2), r["dead"]])
        else:  # a dense model's neurons
            halves.append([r["layer"], _number(r["rate_top_half"], 3), _number(r["energy_top_half"], 3)])
    if halves:
        return [pairs(rows), grid(["layer", "activity of the busiest half", "energy of it"], halves)]
    return [pairs(rows), grid(["layer", "router entropy", "max/mean load", "dead experts"], loads)]


def verified(result: Verified) -> list[Table]:
    """Whether a checkpoint passed the checks."""
    checked = result["checked"]
    loads = result["loads"]["transformers"]
    of_tensors = f"{counted(checked['tensors'], 'tensor')} in " if checked["tensors"] else ""  # none of GGUF are read
    rows = {
        "verdict": "whole" if result["ok"] else counted(len(result["problems"]), "problem"),
        "checked": f"{of_tensors}{counted(checked['shards'], 'shard')}, {human_bytes(checked['bytes'])}",
        "manifest": "every file hashed" if result["manifest"] else "none: moeconv did not write this checkpoint",
        "transformers": None if loads is None else ("loads strictly and runs" if loads else "does not load and run"),
    }
    tables = [pairs(rows)]
    if result["problems"]:
        tables.append(grid(["problem"], [[p] for p in result["problems"]]))
    return tables


def reported(result: ReportResult) -> list[Table]:
    """A summary of a report page."""
    figures = result["figures"]
    history = [[s["command"], human_count(s["total"] or 0), human_count(s["active"] or 0)] for s in figures["history"]]
    tables = [pairs({"output": f"{result['output']} ({human_bytes(result['bytes'])})"})]
    if history:
        tables.append(grid(["step", "parameters", "active"], history))
    if figures["pipeline"]:
        tables.append(steps_table({"steps": figures["pipeline"], "output": None})[0])
    if rows := figures.get("utilization"):
        layers = [[r["layer"], _number(r["entropy"], 3), _number(r["max_over_mean"], 2), r["dead"]] for r in rows]
        tables.append(grid(["layer", "router entropy", "max/mean load", "dead experts"], layers))
    return tables


def steps_table(result: JsonObject) -> list[Table]:
    """A recipe or the demo: one row per step. `result` is a Ran or a Located; a report has rows of other steps."""
    if "steps" not in result:
        return [pairs({"output": result["output"]})]
    planned = result.get("dry_run", False)
    rows = []
    for r in result["steps"]:
        sizes = [human_count(r[k]) if r.get(k) else "-" for k in ("total", "active")]
        sizes.append(human_bytes(r["bytes"]) if r.get("bytes") else "-")
        if planned:
            found = [human_bytes(r["memory_bytes"]) if r.get("memory_bytes") else "-"]
        else:
            took = "kept" if r.get("kept") else human_seconds(r.get("seconds") or 0)
            found = [_number(r.get("loss")), _number(r.get("kl")), took]
        rows.append([r["step"], *sizes, *found])
    columns = ["step", "parameters", "active", "bytes"]
    columns += ["peak memory, about"] if planned else ["loss", "KL", "time"]
    words = {"output": result["output"], "report": result.get("report"), "recipe": result.get("saved")}
    if planned:
        need, free = human_bytes(result["disk_bytes"]), human_bytes(result["disk_free_bytes"])
        words = {"output": f"{result['output']} (dry run: nothing written)", "disk": f"{need} needed, {free} free"}
    return [grid(columns, rows), pairs(words)]


def json_text(result: Mapping[str, object]) -> list[Text]:
    """A result that people see as JSON too."""
    from rich.text import Text

    return [Text(json.dumps(result, indent=2), no_wrap=True, overflow="ignore")]
