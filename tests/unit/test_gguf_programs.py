"""What ollama and LM Studio read of a GGUF file before they run it: keys of the metadata with their types, and the name
of the file."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from moeconv.recipe.read import DEMO_DATA

gguf = pytest.importorskip("gguf")
STRING, NUMBER, FLOAT, BOOL = (
    gguf.GGUFValueType.STRING,
    gguf.GGUFValueType.UINT32,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.BOOL,
)
# key -> type. Architecture, kind, type of the file, sizes and the chat template: ollama's fs/ggml/ggml.go. A number of
# another type is read as missing there. The tokenizer: llama.cpp, which runs the file in both programs.
KEYS = {
    "general.architecture": STRING, "general.type": STRING, "general.name": STRING, "general.size_label": STRING,
    "general.file_type": NUMBER, "general.quantization_version": NUMBER,
    "{arch}.context_length": NUMBER, "{arch}.embedding_length": NUMBER, "{arch}.block_count": NUMBER,
    "{arch}.attention.head_count": NUMBER, "{arch}.attention.head_count_kv": NUMBER,
    "{arch}.attention.layer_norm_rms_epsilon": FLOAT, "{arch}.rope.freq_base": FLOAT,
    "{arch}.expert_count": NUMBER, "{arch}.expert_used_count": NUMBER,
    "tokenizer.ggml.model": STRING, "tokenizer.ggml.pre": STRING, "tokenizer.ggml.tokens": STRING,
    "tokenizer.ggml.token_type": gguf.GGUFValueType.INT32, "tokenizer.ggml.merges": STRING,
    "tokenizer.ggml.eos_token_id": NUMBER, "tokenizer.chat_template": STRING,
}  # fmt: skip


@pytest.fixture
def written(tmp_path, cli):
    """A GGUF file with a Modelfile, of a model with a chat template and settings for generation."""
    dense = shutil.copytree(DEMO_DATA / "model", tmp_path / "Demo-Chat-v2")
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (dense / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (dense / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "eos_token_id": 1}))
    for words in (
        ("upcycle", dense, tmp_path / "Demo-Chat-MoE", "--method", "drop", "--experts", "4", "--no-check"),
        ("quantize", tmp_path / "Demo-Chat-MoE", tmp_path / "out", "--format", "gguf", "--scheme", "q8_0",
         "--modelfile", "--file-name", "Demo-Chat-MoE-{type}"),
    ):  # fmt: skip
        done = cli(*words, "-q")
        assert done.code == 0, done.err
    return tmp_path / "out"


def test_the_metadata_has_what_programs_read(written):
    (file,) = written.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    arch = fields["general.architecture"].contents()
    for key, kind in KEYS.items():
        field = fields[key.format(arch=arch)]
        assert field.types[-1] == kind, key
    value = {key: field.contents() for key, field in fields.items()}
    assert value["general.type"] == "model" and value["general.name"] == "Demo Chat MoE"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert (value[f"{arch}.expert_count"], value[f"{arch}.expert_used_count"]) == (4, 2)
    assert value["tokenizer.chat_template"].startswith("{% for m in messages %}")
    tokens = value["tokenizer.ggml.tokens"]
    assert len(tokens) == len(value["tokenizer.ggml.token_type"]) > value["tokenizer.ggml.eos_token_id"]


def test_the_file_is_aligned_and_has_the_tensors_that_a_layer_needs(written):
    (file,) = written.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    arch = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{arch}.block_count"].contents()
    assert {int(m[1]) for n in names if (m := re.match(r"blk\.(\d+)\.", n))} == set(range(layers))
    assert {"token_embd.weight", "output_norm.weight"} <= names
    for layer in range(layers):
        assert {f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")} <= names
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert all(np.prod(tensor.shape) == tensor.n_elements for tensor in reader.tensors)


def test_the_name_of_the_file_ends_with_its_type_and_the_modelfile_names_it(written):
    (file,) = written.glob("*.gguf")
    assert re.fullmatch(r".+-(Q\d\w*|IQ\d\w*|F16|BF16|F32|MXFP4\w*)\.gguf", file.name)  # as LM Studio and hubs show it
    lines = (written / "Modelfile").read_text().splitlines()
    assert lines[0] == f"FROM ./{file.name}" and "PARAMETER temperature 0.7" in lines
    assert not any(line.startswith("TEMPLATE") for line in lines)  # ollama takes that of the metadata


def test_inspect_reads_the_directory_that_quantize_wrote(written, cli):
    (file,) = written.glob("*.gguf")
    folder, alone = cli("inspect", written, "--json").json, cli("inspect", file, "--json").json
    assert folder.pop("path") == str(written) and alone.pop("path") == str(file)
    assert folder == alone and folder["num_experts"] == 4 and folder["quantization"]["format"] == "gguf"
    shutil.copy(file, written / "another.gguf")
    assert cli("inspect", written).code == 3
