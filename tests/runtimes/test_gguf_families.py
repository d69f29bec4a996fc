"""Every family that GGUF is written for: logits of llama.cpp against transformers, and the file against that of
llama.cpp's own converter. MOECONV_LLAMA_CPP_PYTHON, MOECONV_CONVERTER_PYTHON and MOECONV_LLAMA_CPP_SOURCE name them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import agreement as runtimes
import numpy as np
import torch
from contract.gguf_cases import CASES, SIZE, make
from contract.stock import load

torch.set_num_threads(1)
gguf = pytest.importorskip("gguf")


def asked() -> torch.Tensor:
    """Tokens that are longer than every window of the cases."""
    return torch.randint(3, SIZE, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def wanted(source: Path) -> torch.Tensor:
    """Log-probabilities of transformers after the last token, in float32."""
    return load(source)(input_ids=asked()).logits[:, -1].log_softmax(-1)


def found(file: Path) -> torch.Tensor:
    """The same of llama.cpp."""
    job = {"model": str(file), "prompts": asked().tolist(), "length": 1, "texts": [], "vocabulary": SIZE}
    answer = runtimes.in_environment(runtimes.RUNTIMES["llama.cpp"], "run_llama_cpp.py", job | {"float32": True})
    result = torch.full((2, SIZE), float("nan"))
    for row, pairs in enumerate(answer["logprobs"]):
        ids, values = zip(*pairs, strict=True)
        result[row, list(ids)] = torch.tensor(values)
    return result


@pytest.mark.slow
@pytest.mark.skipif("MOECONV_LLAMA_CPP_PYTHON" not in os.environ, reason="MOECONV_LLAMA_CPP_PYTHON is not set")
@pytest.mark.parametrize("scheme", ["f32", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does(tmp_path, name, scheme):
    """float32 weights to 1e-4 where llama.cpp computes in float32; float16 weights to 1e-2, beside the rounding of the
    weights themselves."""
    source = make(tmp_path / "source", name)
    runtimes.quantize(source, tmp_path / "out", {"format": "gguf", "scheme": scheme})
    limit = CASES[name][2]
    reference = wanted(source)
    if scheme == "f16":
        exact, reference = reference, rounded(source)
        # a random model may move by more than 1e-2 where its weights move by half a unit of float16 (gated delta rule)
        limit = max(limit, 1e-2, 2 * float((reference - exact).abs().max()))
    difference = (found(tmp_path / "out" / "model.gguf") - reference).abs().nan_to_num().max()
    assert difference <= limit, f"{difference:.1e}"


def rounded(source: Path) -> torch.Tensor:
    """Log-probabilities of transformers with matrices that are rounded to float16, as the file has them."""
    from moeconv.families.model import open_model
    from moeconv.quantize.gguf.llama_cpp import find_row, is_float32, written

    model = open_model(source)
    row, halved = find_row(model), set()
    for name, role in model.roles.items():
        made = list(written(model, row, model.checkpoint.tensors[name], role))
        if made and not any(is_float32(tensor.target, tensor.part.shape) for tensor in made):
            halved.add(name)
    from safetensors.torch import load_file, save_file

    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({n: t.half().float() if n in halved else t for n, t in tensors.items()}, shard, {"format": "pt"})
    return wanted(source)


@pytest.mark.slow
@pytest.mark.skipif("MOECONV_CONVERTER_PYTHON" not in os.environ, reason="MOECONV_CONVERTER_PYTHON is not set")
def test_the_file_is_that_of_the_converter(tmp_path):
    """Names, dtypes, shapes and values of all tensors; the keys are compared in tests/contract/test_gguf_families.py,
    with the table that converted.py makes of these files."""
    from converted import convert, for_converter

    folders = {name: for_converter(make(tmp_path / f"case-{i}", name)) for i, name in enumerate(CASES)}
    convert(list(folders.values()), "f16")
    files = {name: folder / "converted.gguf" for name, folder in folders.items()}
    assert sum(file.exists() for file in files.values()) >= 60
    for name, folder in folders.items():
        if not files[name].exists():
            continue
        runtimes.quantize(folder, tmp_path / f"{folder.name}-out", {"format": "gguf", "scheme": "f16"})
        ours, theirs = (
            {t.name: t for t in gguf.GGUFReader(file).tensors}
            for file in (tmp_path / f"{folder.name}-out" / "model.gguf", files[name])
        )
        for tensor in set(ours) & set(theirs):
            mine, other = ours[tensor], theirs[tensor]
            assert mine.tensor_type == other.tensor_type, (name, tensor)
            if name.startswith("granitemoehybrid") and tensor.endswith(("attn_q.weight", "attn_k.weight")):
                continue  # the converter knows only the older words of layer_types
            if name == "bamba" and tensor.endswith(("attn_q.weight", "attn_k.weight")):
                continue  # the converter takes the whole head for rotating
            np.testing.assert_allclose(
                mine.data.reshape(-1), other.data.reshape(-1), rtol=1e-6, atol=1e-6, err_msg=f"{name} {tensor}"
            )
