"""The verbs: positionals, option groups and the step that each one calls. Typer functions are built from these rows.

A flag is declared once, as a field in moeconv.options; this table only says which verb takes which group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv import options as o
from moeconv.cli import tables
from moeconv.errors import CheckError
from moeconv.plan.meter import Meter

Run = Callable[[Mapping[str, Any], Meter], dict[str, Any]]


@dataclass(frozen=True)
class Positional:
    """An argument without a flag; `model` ones may be `-`, the JSON or path on standard input. `reads` as in
    `options.option`; the path of one that `writes` is never one that the command reads."""

    name: str
    help: str
    model: bool = False
    required: bool = True
    reads: o.Reads = ""
    writes: bool = False


@dataclass(frozen=True)
class Verb:
    """A command. `run` gets all values by name; `failed` turns a result into the error that its exit code needs."""

    name: str
    help: str
    positionals: tuple[Positional, ...]
    groups: tuple[type, ...]
    run: Run
    table: Callable[[Mapping[str, Any]], Any]
    failed: Callable[[Mapping[str, Any]], CheckError | None] = lambda _result: None
    distributed: bool = False  # may be started several times by torchrun


MODEL = Positional("model", "Checkpoint directory, hf://OWNER/NAME[@REVISION], or - for standard input.", model=True,
                   reads="model")  # fmt: skip
SOURCE = Positional("source", "Dense checkpoint: directory, hf://OWNER/NAME, or - for standard input.", model=True,
                    reads="model")  # fmt: skip
OUT = Positional("out", "Directory to write; it must not exist yet (see --overwrite).", writes=True)
_READ = (o.ReadOptions,)
_PLAN = (o.PlanOptions, o.WriteOptions, *_READ)
_MEASURE = (o.DataOptions, o.MeasureOptions)


def _upcycle(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.upcycle.step import upcycle

    return upcycle(v["source"], v["out"], v, meter=meter)


def _tune(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.tune.step import tune

    return tune(v["model"], v["out"], v, meter=meter)


def _prune(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.prune.step import prune

    return prune(v["model"], v["out"], v, meter=meter)


def _quantize(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.quantize.step import quantize

    return quantize(v["model"], v["out"], v, meter=meter)


def _inspect(v: Mapping[str, Any], _meter: Meter) -> dict[str, Any]:
    from moeconv.inspect.step import inspect

    return inspect(v["model"])


def _calibrate(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.calibrate.step import calibrate, merge

    if v["merge"]:
        return merge(v["model"], v["stats"], v["merge"], data=v["data"], overwrite=v["overwrite"])
    return calibrate(v["model"], v["stats"], v, overwrite=v["overwrite"], meter=meter)


def _evaluate(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.evaluate.step import evaluate

    return evaluate(v["model"], v, meter=meter)


def _gates_failed(result: Mapping[str, Any]) -> CheckError | None:
    from moeconv.evaluate.gates import failure

    return failure(result)


def _verify(v: Mapping[str, Any], _meter: Meter) -> dict[str, Any]:
    from moeconv.verify.step import verify

    return verify(v["model"], against=v["source"], load=v["load"])


def _problems(result: Mapping[str, Any]) -> CheckError | None:
    return None if result["ok"] else CheckError(f"{len(result['problems'])} problems: {result['problems'][0]}")


def _report(v: Mapping[str, Any], _meter: Meter) -> dict[str, Any]:
    from moeconv.report.step import load_results, report

    return report(
        v["model"], v["out"], stats=v["stats"], results=load_results(v["results"]),
        reference=v["reference"], title=v["title"], overwrite=v["overwrite"],
    )  # fmt: skip


def _run_recipe(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.recipe.run import run_recipe

    return run_recipe(v["recipe"], settings=v["set"], dry_run=v["dry_run"], meter=meter)


def _demo(v: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    from moeconv.demo import DEMO_DATA, run_demo

    return {"output": str(DEMO_DATA)} if v["where"] else run_demo(v["dir"], meter=meter)


def _families(_v: Mapping[str, Any], _meter: Meter) -> dict[str, Any]:
    from moeconv.families.listing import families

    return families()


def _formats(_v: Mapping[str, Any], _meter: Meter) -> dict[str, Any]:
    from moeconv.quantize.listing import formats

    return formats()


VERBS: tuple[Verb, ...] = (
    Verb("inspect", "What a checkpoint is: sizes, experts, dtypes, quantization.", (MODEL,), _READ, _inspect,
         tables.inspected),
    Verb("upcycle", "Turn a dense checkpoint's FFNs into experts.", (SOURCE, OUT),
         (o.UpcycleOptions, o.StatisticsOptions, *_MEASURE, o.CalibrateOptions, *_PLAN), _upcycle, tables.written),
    Verb("calibrate", "Run data through a model and keep statistics per expert.",
         (MODEL, Positional("stats", "Statistics file to write (.safetensors).", writes=True)),
         (o.CalibrateOptions, *_MEASURE, o.ArtifactOptions, o.SeedOptions, o.MergeOptions, *_READ), _calibrate,
         tables.calibrated, distributed=True),
    Verb("tune", "Train the router briefly, against a teacher or on text.", (MODEL, OUT),
         (o.TuneOptions, *_MEASURE, *_PLAN), _tune, tables.written, distributed=True),
    Verb("prune", "Remove redundant experts.",
         (MODEL, Positional("out", "Directory to write; it must not exist yet (with --curve: a .json or plot file).",
                            required=False, writes=True)),
         (o.PruneOptions, o.StatisticsOptions, *_MEASURE, o.CalibrateOptions, *_PLAN), _prune, tables.pruned),
    Verb("quantize", "Pack the experts to INT8 or 4 bits.", (MODEL, OUT),
         (o.QuantizeOptions, o.StatisticsOptions, *_MEASURE, *_PLAN), _quantize, tables.written),
    Verb("evaluate", "Loss on text, alone or against a reference, with gates for CI.", (MODEL,),
         (o.EvaluateOptions, *_MEASURE, o.SampleOptions, *_READ), _evaluate, tables.evaluated, _gates_failed),
    Verb("verify", "Check every byte against the manifest, and the structure against the family.", (MODEL,),
         (o.VerifyOptions, *_READ), _verify, tables.verified, _problems),
    Verb("report", "One HTML page: what was done, sizes, loads, similarities, losses.",
         (MODEL, Positional("out", "HTML file to write.", writes=True)),
         (o.ReportOptions, o.ArtifactOptions, *_READ), _report,
         tables.reported),
    Verb("run", "Run a recipe of steps.", (Positional("recipe", "YAML file.", reads="file"),), (o.RunOptions,),
         _run_recipe, tables.steps_table),
    Verb("families", "The supported families and conversions.", (), (), _families, tables.family_table),
    Verb("formats", "The quantization formats and the runtimes that load them.", (), (), _formats,
         tables.format_table),
    Verb("demo", "The whole pipeline on the small checkpoint that ships with moeconv.",
         (Positional("dir", "Directory to write to (default: a temporary one).", required=False, writes=True),),
         (o.DemoOptions,), _demo, tables.steps_table),
)  # fmt: skip
