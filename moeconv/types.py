"""Names for JSON objects that have no type of their own. Imports nothing of moeconv.

`Any` stands here for the values of an object that transformers or another tool defines: a full type does not exist, and
each reader checks the value that it reads. Everything that moeconv itself writes has a type in `moeconv.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeAlias

# The config of a model (config.json, or one of its nested blocks), which the reader does not change.
Config: TypeAlias = Mapping[str, Any]

# A config that is being built or changed.
MutableConfig: TypeAlias = MutableMapping[str, Any]

# Any other decoded JSON object.
JsonObject: TypeAlias = dict[str, Any]
