"""The options of all commands, each declared once: a field's name is that of its flag, recipe key and parameter.

A group of options is a frozen dataclass. The metadata of a field has its help text and its choices: either the words
themselves or the name of the registry that has them (`choices_of` reads both).
"""

from __future__ import annotations

from moeconv.options.arrange import ArrangeOptions
from moeconv.options.build import check_names, from_keywords, parameters_of
from moeconv.options.calibrate import CalibrateOptions, ImatrixOptions, MergeOptions
from moeconv.options.collapse import CollapseOptions
from moeconv.options.declare import (
    PANELS,
    Panel,
    Reads,
    choices_of,
    flag_of,
    help_of,
    metavar_of,
    option,
    panel_of,
    reads_of,
)
from moeconv.options.defaults import (
    EVALUATE_SEQ_LEN,
    EXPERTS,
    LEAST_SAMPLE,
    LOOKS,
    NEURON_TOKENS,
    SAMPLE_TOKENS,
    SCOPES,
    SEQ_LEN,
    TOKENS,
    TOP_K,
)
from moeconv.options.evaluate import EvaluateOptions, SampleOptions
from moeconv.options.importing import ImportOptions
from moeconv.options.prune import PruneOptions
from moeconv.options.quantize import QuantizeOptions
from moeconv.options.read_only import FamiliesOptions, FormatsOptions, ReportOptions, VerifyOptions
from moeconv.options.run import DemoOptions, RunOptions
from moeconv.options.shared import (
    ArtifactOptions,
    DataOptions,
    DryOptions,
    MeasureOptions,
    PlanOptions,
    ReadOptions,
    SeedOptions,
    StatisticsOptions,
    WriteOptions,
)
from moeconv.options.tune import TuneOptions
from moeconv.options.upcycle import UpcycleOptions
from moeconv.options.values import device_limit, parse_index, parse_layers, parse_size

__all__ = [
    "EVALUATE_SEQ_LEN",
    "EXPERTS",
    "LEAST_SAMPLE",
    "LOOKS",
    "NEURON_TOKENS",
    "PANELS",
    "SAMPLE_TOKENS",
    "SCOPES",
    "SEQ_LEN",
    "TOKENS",
    "TOP_K",
    "ArrangeOptions",
    "ArtifactOptions",
    "CalibrateOptions",
    "CollapseOptions",
    "DataOptions",
    "DemoOptions",
    "DryOptions",
    "EvaluateOptions",
    "FamiliesOptions",
    "FormatsOptions",
    "ImatrixOptions",
    "ImportOptions",
    "MeasureOptions",
    "MergeOptions",
    "Panel",
    "PlanOptions",
    "PruneOptions",
    "QuantizeOptions",
    "ReadOptions",
    "Reads",
    "ReportOptions",
    "RunOptions",
    "SampleOptions",
    "SeedOptions",
    "StatisticsOptions",
    "TuneOptions",
    "UpcycleOptions",
    "VerifyOptions",
    "WriteOptions",
    "check_names",
    "choices_of",
    "device_limit",
    "flag_of",
    "from_keywords",
    "help_of",
    "metavar_of",
    "option",
    "panel_of",
    "parameters_of",
    "parse_index",
    "parse_layers",
    "parse_size",
    "reads_of",
]
