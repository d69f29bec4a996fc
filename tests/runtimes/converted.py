"""What llama.cpp's converter makes of every case of tests/contract/gguf_cases.py, as the table with which moeconv's
files are compared where there is no converter.

    MOECONV_CONVERTER_PYTHON=... MOECONV_LLAMA_CPP_SOURCE=DIR python tests/runtimes/converted.py

Writes tests/contract/gguf_converted.json: {case: {"keys": {key: value}, "tensors": {name: [dtype, shape]}}}, without
the keys that name the model or hold its tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE.parent / "contract" / "gguf_converted.json"
sys.path.insert(0, str(HERE.parent))

import gguf  # noqa: E402
from contract.gguf_cases import CASES, make  # noqa: E402

from moeconv.families.model import open_model  # noqa: E402
from moeconv.families.written import added  # noqa: E402

OF_THE_FOLDER = ("general.name", "general.basename", "general.finetune", "general.version", "general.tags")
TOKENS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")


def described(path: Path) -> dict[str, Any]:
    """The keys and the tensors of a file, as the table has them."""
    reader = gguf.GGUFReader(path)
    left_out = (*OF_THE_FOLDER, *TOKENS)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.") and k not in left_out}
    tensors = {t.name: [t.tensor_type.name, [int(n) for n in reversed(t.shape)]] for t in reader.tensors}
    return {"keys": dict(sorted(keys.items())), "tensors": dict(sorted(tensors.items()))}


def for_converter(folder: Path) -> Path:
    """The checkpoint with the keys that readers other than transformers need, as every output of moeconv has them."""
    model = open_model(folder)
    values = model.config
    config = json.loads((folder / "config.json").read_text())
    new = {key: value for key, value in added(model.family, values).items() if key not in config}
    (folder / "config.json").write_text(json.dumps(config | new))
    return folder


def convert(folders: Sequence[Path], kind: str) -> None:
    """Write FOLDER/converted.gguf for every folder that the converter takes."""
    command = [os.environ["MOECONV_CONVERTER_PYTHON"], str(HERE / "run_converter.py")]
    command += [os.environ["MOECONV_LLAMA_CPP_SOURCE"], kind]
    command += [str(part) for folder in folders for part in (folder, folder / "converted.gguf")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        folders = {name: for_converter(make(Path(work) / f"case-{i}", name)) for i, name in enumerate(CASES)}
        convert(list(folders.values()), "f16")
        found = {
            name: described(at / "converted.gguf") for name, at in folders.items() if (at / "converted.gguf").exists()
        }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name in sorted(set(CASES) - set(found)):
        print(f"the converter does not take {name}")


if __name__ == "__main__":
    main()
