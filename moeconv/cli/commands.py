"""The commands: the arguments, the request and the step of each. Typer functions are built from these rows.

A flag is declared once, as a field in moeconv.options; this table only states which command takes which groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from moeconv import options as o
from moeconv import requests as r
from moeconv.cli import listings, tables
from moeconv.errors import CheckError
from moeconv.plan.meter import Meter
from moeconv.units import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeconv.contract import Verified

Result: TypeAlias = Mapping[str, object]  # the JSON object of a command, as moeconv.contract describes it


@dataclass(frozen=True)
class Positional:
    """An argument without a flag. A `model` may be `-`: the JSON or the path on standard input. `reads` is as in
    `options.option`; an argument that `writes` may not name anything that the command reads."""

    name: str
    help: str
    model: bool = False
    required: bool = True
    reads: o.Reads = ""
    writes: bool = False


@dataclass(frozen=True)
class Verb:
    """A command. `run` takes an object of class `request` and returns the result, from which `table` makes what people
    see, and `failed` the error of a check that did not pass. Their types differ from command to command."""

    name: str
    help: str
    positionals: tuple[Positional, ...]
    request: type
    run: Callable[[Any, Meter], Result]
    table: Callable[[Any], Sequence[RenderableType]]
    failed: Callable[[Any], CheckError | None] = lambda _result: None
    distributed: bool = False  # torchrun may start it as several processes

    @property
    def groups(self) -> tuple[type, ...]:
        """The option groups whose fields are its flags."""
        return r.groups_of(self.request)


MODEL = Positional("model", "Checkpoint directory, hf://OWNER/NAME[@REVISION], or - for standard input.", model=True,
                   reads="model")  # fmt: skip
SOURCE = Positional("source", "Dense checkpoint: directory, hf://OWNER/NAME, or - for standard input.", model=True,
                    reads="model")  # fmt: skip
OUT = Positional("out", "Directory to write; it must not exist yet (see --overwrite).", writes=True)


def _step(request: object, meter: Meter) -> Result:
    from moeconv.steps import run_request

    return run_request(request, meter)


def _gates_failed(result: Result) -> CheckError | None:
    from moeconv.evaluate.gates import failure

    return failure(result)


def _problems(result: Verified) -> CheckError | None:
    return (
        None if result["ok"] else CheckError(f"{counted(len(result['problems']), 'problem')}: {result['problems'][0]}")
    )


def _recipes(request: r.RecipesRequest, _meter: Meter) -> Result:
    from moeconv.recipe.shipped import recipes

    return recipes(request.name, request.dest)


def _demo(request: r.DemoRequest, meter: Meter) -> Result:
    from moeconv.demo import DEMO_DATA, run_demo

    return {"output": str(DEMO_DATA)} if request.demo.where else run_demo(request.dir, meter=meter)


def _families(request: r.FamiliesRequest, _meter: Meter) -> Result:
    from moeconv.families.listing import families
    from moeconv.quantize.listing import formats_of

    return dict(families(formats_of, model=request.families.model))


def _formats(request: r.FormatsRequest, _meter: Meter) -> Result:
    from moeconv.quantize.listing import formats

    return dict(formats(request.formats.for_))


def _schema(request: r.SchemaRequest, _meter: Meter) -> Result:
    from moeconv.contract import schemas

    return schemas(request.command)


VERBS: tuple[Verb, ...] = (
    Verb("inspect", "What a checkpoint is: sizes, experts, dtypes, quantization.", (MODEL,), r.InspectRequest, _step,
         tables.inspected),
    Verb("upcycle", "Turn a dense checkpoint's FFNs into experts.", (SOURCE, OUT), r.UpcycleRequest, _step,
         tables.written),
    Verb("calibrate", "Run data through a model and keep statistics per expert.",
         (MODEL, Positional("stats", "Statistics file to write (.safetensors).", required=False, writes=True)),
         r.CalibrateRequest, _step, tables.calibrated, distributed=True),
    Verb("tune", "Train the router briefly, against a teacher or on text.", (MODEL, OUT), r.TuneRequest, _step,
         tables.written, distributed=True),
    Verb("prune", "Remove redundant experts.",
         (MODEL, Positional("out", "Directory to write; it must not exist yet (with --curve: a .json or plot file).",
                            required=False, writes=True)), r.PruneRequest, _step, tables.pruned, distributed=True),
    Verb("quantize", "Quantize the experts to 8 bits or fewer.", (MODEL, OUT), r.QuantizeRequest, _step,
         tables.written, distributed=True),
    Verb("import", "Turn a GGUF file into a transformers checkpoint.",
         (Positional("gguf", "GGUF file.", reads="file"), OUT), r.ImportRequest, _step, tables.written),
    Verb("arrange", "Reorder the experts so that every device has an equal load.", (MODEL, OUT), r.ArrangeRequest,
         _step, tables.written),
    Verb("collapse", "Turn a Mixture-of-Experts into a dense model.", (MODEL, OUT), r.CollapseRequest, _step,
         tables.written),
    Verb("evaluate", "Measure loss on text and accuracy on tasks, with gates for CI.", (MODEL,), r.EvaluateRequest,
         _step, tables.evaluated, _gates_failed),
    Verb("verify", "Check every byte against the manifest, and the structure against the family.", (MODEL,),
         r.VerifyRequest, _step, tables.verified, _problems),
    Verb("report", "One HTML page: what was done, sizes, loads, similarities, losses.",
         (MODEL, Positional("out", "HTML file to write.", writes=True)), r.ReportRequest, _step, tables.reported),
    Verb("run", "Run a recipe of steps.", (Positional("recipe", "YAML file.", reads="file"),), r.RunRequest,
         _step, tables.steps_table),
    Verb("recipes", "The recipes that ship with moeconv: list them, or copy one.",
         (Positional("name", "Name of a recipe to copy (default: list all).", required=False),
          Positional("dest", "Where to copy it (default: the working directory).", required=False)),
         r.RecipesRequest, _recipes, listings.recipe_table),
    Verb("families", "The supported families, what can be done with each, and the conversions.", (), r.FamiliesRequest,
         _families, listings.family_table),
    Verb("formats", "The quantization formats and the runtimes that load them.", (), r.FormatsRequest, _formats,
         listings.format_table),
    Verb("schema", "The JSON Schema of what commands print with --json.",
         (Positional("command", "One command (default: all).", required=False),), r.SchemaRequest, _schema,
         tables.json_text),
    Verb("demo", "The whole pipeline on the small checkpoint that ships with moeconv.",
         (Positional("dir", "Directory to write to (default: a temporary one).", required=False, writes=True),),
         r.DemoRequest, _demo, tables.steps_table),
)  # fmt: skip
