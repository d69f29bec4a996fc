"""The JSON that each command prints with --json, as types. `moeconv schema` prints them as JSON Schemas.

The tests validate every object that a command prints against its schema.

A new version may add fields but removes none. The comment at a NotRequired field says when the field is present.
"""

from __future__ import annotations

from moeconv.contract.arranged import ArrangeBlock, Arranged, ArrangedFigures, ArrangedLayer, ShareFigures
from moeconv.contract.calibrated import Calibrated, Load, NeuronLayer, SourceTokens
from moeconv.contract.collapsed import CollapseBlock, Collapsed, CollapsedLayer
from moeconv.contract.evaluated import (
    Comparison,
    Evaluated,
    Figure,
    Gate,
    NotFinite,
    Perplexity,
    SourceLoss,
    TaskResult,
    Tasks,
)
from moeconv.contract.failed import ErrorFields, Failed
from moeconv.contract.imported import ImportBlock, ImportResult
from moeconv.contract.inspected import Inspected, Quantization, RoleCounts
from moeconv.contract.listed import Families, FamilyPair, FamilySource, FormatRow, Formats, Schemas
from moeconv.contract.pruned import (
    Cost,
    Curve,
    CurveRow,
    DistillFigures,
    MixRow,
    PruneBlock,
    Pruned,
    RefitFigures,
    RefitLayer,
)
from moeconv.contract.quantized import (
    Between,
    CodesFigures,
    CodesLayer,
    ErrorLayer,
    MeanMax,
    PackingError,
    QuantizeBlock,
    Quantized,
)
from moeconv.contract.ran import CopiedRecipe, Located, Ran, Reported, ShippedRecipe, ShippedRecipes, StepRow
from moeconv.contract.schema import RESULTS, json_schema, schemas
from moeconv.contract.shared import Counts, Device, Foreseen, Memory, Written
from moeconv.contract.tuned import LoadBefore, TuneBlock, Tuned, TunedLayer, TunedTokens, TunePlanned, TunePlannedBlock
from moeconv.contract.upcycled import (
    AddedLayer,
    Counterpart,
    Difference,
    Equivalence,
    Extended,
    ExtendedSource,
    RouterFigures,
    RouterLayer,
    SplitLayer,
    UpcycleBlock,
    Upcycled,
)
from moeconv.contract.verified import Checked, Loads, Verified

__all__ = [
    "RESULTS",
    "AddedLayer",
    "ArrangeBlock",
    "Arranged",
    "ArrangedFigures",
    "ArrangedLayer",
    "Between",
    "Calibrated",
    "Checked",
    "CodesFigures",
    "CodesLayer",
    "CollapseBlock",
    "Collapsed",
    "CollapsedLayer",
    "Comparison",
    "CopiedRecipe",
    "Cost",
    "Counterpart",
    "Counts",
    "Curve",
    "CurveRow",
    "Device",
    "Difference",
    "DistillFigures",
    "Equivalence",
    "ErrorFields",
    "ErrorLayer",
    "Evaluated",
    "Extended",
    "ExtendedSource",
    "Failed",
    "Families",
    "FamilyPair",
    "FamilySource",
    "Figure",
    "Foreseen",
    "FormatRow",
    "Formats",
    "Gate",
    "ImportBlock",
    "ImportResult",
    "Inspected",
    "Load",
    "LoadBefore",
    "Loads",
    "Located",
    "MeanMax",
    "Memory",
    "MixRow",
    "NeuronLayer",
    "NotFinite",
    "PackingError",
    "Perplexity",
    "PruneBlock",
    "Pruned",
    "Quantization",
    "QuantizeBlock",
    "Quantized",
    "Ran",
    "RefitFigures",
    "RefitLayer",
    "Reported",
    "RoleCounts",
    "RouterFigures",
    "RouterLayer",
    "Schemas",
    "ShareFigures",
    "ShippedRecipe",
    "ShippedRecipes",
    "SourceLoss",
    "SourceTokens",
    "SplitLayer",
    "StepRow",
    "TaskResult",
    "Tasks",
    "TuneBlock",
    "TunePlanned",
    "TunePlannedBlock",
    "Tuned",
    "TunedLayer",
    "TunedTokens",
    "UpcycleBlock",
    "Upcycled",
    "Verified",
    "Written",
    "json_schema",
    "schemas",
]
