"""Against llama.cpp's own tools: the type of every tensor, the error of every encoder, and importance matrices.

Runs where MOECONV_LLAMA_QUANTIZE names the binary llama-quantize (with llama-imatrix beside it), as built by:

    cmake -B build LLAMA_CPP -DLLAMA_CURL=OFF && cmake --build build --target llama-quantize llama-imatrix
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_moe
from unit.test_gguf import floats, tokenizer
from words import text

from moeconv.plan.kernels.pack import ggml
from moeconv.quantize.gguf.recipes import RECIPES, is_quantized

gguf = pytest.importorskip("gguf")
BINARY = os.environ.get("MOECONV_LLAMA_QUANTIZE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARY, reason="MOECONV_LLAMA_QUANTIZE does not name llama-quantize"),
]
MOST = 1.02  # times llama-quantize's squared error
# a recipe that has each block format
OF_TYPE = {
    "Q2_K": "q2_k", "Q3_K": "q3_k_s", "Q4_K": "q4_k_s", "Q5_K": "q5_k_s", "Q6_K": "q6_k", "Q8_0": "q8_0",
    "Q4_0": "q4_0", "Q4_1": "q4_1", "Q5_0": "q5_0", "Q5_1": "q5_1", "IQ4_NL": "iq4_nl", "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4_moe",
}  # fmt: skip
SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def llama(tool, *words):
    done = subprocess.run([Path(BINARY).with_name(tool), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with a text, as float32 in GGUF, and the importance matrices of both programs."""
    folder = tmp_path_factory.mktemp("peer")
    path = make_moe(folder / "moe", "qwen3_moe", hidden=256, intermediate=512, layers=9, experts=8, vocab=300)
    tokenizer(path, size=300, pre_tokenizer=SPLIT)
    (folder / "text.txt").write_text(text(1500))
    for words in (
        ("quantize", path, folder / "f32", "--format", "gguf", "--scheme", "f32"),
        ("calibrate", path, "--imatrix", folder / "ours.gguf", "--data", folder / "text.txt", "--seq-len", "128"),
    ):
        subprocess.run([sys.executable, "-m", "moeconv", *map(str, words), "-q"], check=True)
    llama("llama-imatrix", "-m", folder / "f32/model.gguf", "-f", folder / "text.txt", "-o", folder / "theirs.gguf",
          "-c", 128, "-b", 128, "-ub", 128, "-t", 1, "--no-ppl")  # fmt: skip
    return folder


def test_importance_matrices_are_equal(source):
    ours, theirs = tensors(source / "ours.gguf"), tensors(source / "theirs.gguf")
    # llama-imatrix also lists the routers, which no recipe quantizes
    theirs = {name: t for name, t in theirs.items() if is_quantized(name.rpartition(".")[0], (2, 2))}
    assert ours.keys() == theirs.keys() and any("exps" in name for name in theirs)
    for name in theirs:
        if not name.endswith(".in_sum2"):
            continue
        counts = [np.array(t[name.replace("in_sum2", "counts")].data).ravel() for t in (ours, theirs)]
        # a token between two experts of equal scores may go to either; an expert without tokens has the mean here
        assert np.abs(np.where(counts[1] > 0, counts[0] - counts[1], 0)).max() <= 3, name
        same = (counts[0] == counts[1]) & (counts[1] > 0)
        rows = [np.array(t[name].data).reshape(len(same), -1)[same] for t in (ours, theirs)]
        assert same.any() and np.abs(rows[0] - rows[1]).sum() < 1e-3 * rows[1].sum(), name


@pytest.mark.parametrize("experts", [8, 16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_every_tensor_has_the_type_that_llama_quantize_gives_it(tmp_path, cli, family, experts):
    path = make_moe(tmp_path / "moe", family, hidden=64, intermediate=512, layers=9, experts=experts, vocab=128)
    tokenizer(path, size=128)
    assert cli("quantize", path, tmp_path / "f32", "--format", "gguf", "--scheme", "f32").code == 0
    for recipe in RECIPES:
        if recipe.needs_imatrix:
            continue
        out = tmp_path / f"ours-{recipe.name}"
        assert cli("quantize", path, out, "--format", "gguf", "--scheme", recipe.name, "--scope", "all").code == 0
        word = "mxfp4_moe" if recipe.name == "mxfp4" else recipe.name
        llama("llama-quantize", tmp_path / "f32/model.gguf", tmp_path / "theirs.gguf", word, 1)
        ours, theirs = (gguf.GGUFReader(p) for p in (out / "model.gguf", tmp_path / "theirs.gguf"))
        types = [{t.name: t.tensor_type.name for t in reader.tensors} for reader in (ours, theirs)]
        assert types[0] == types[1], recipe.name
        kinds = [reader.fields["general.file_type"].contents() for reader in (ours, theirs)]
        assert kinds[0] == kinds[1], recipe.name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", OF_TYPE)
def test_no_encoder_errs_more_than_llama_quantize(source, tmp_path, dtype, weighted):
    importance = ("--imatrix", source / "theirs.gguf") if weighted else ()
    llama("llama-quantize", *importance, source / "f32/model.gguf", tmp_path / "theirs.gguf", OF_TYPE[dtype], 1)
    plain, theirs, matrix = (
        tensors(p) for p in (source / "f32/model.gguf", tmp_path / "theirs.gguf", source / "theirs.gguf")
    )
    name = next(n for n, t in theirs.items() if t.tensor_type.name == dtype and f"{n}.counts" in matrix)
    x, y = (floats(t[name]) for t in (plain, theirs))
    w = np.array(matrix[f"{name}.in_sum2"].data).reshape(-1, x.shape[-1])
    errors = [0.0, 0.0]
    for e, (one, other) in enumerate(zip(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *x.shape[-2:]))):
        by = w[e] if weighted else np.ones_like(w[e])
        if not by.any():
            continue  # an expert without tokens, which each program treats in its own way
        mine = ggml.decode(
            ggml.encode(torch.from_numpy(one.copy()), dtype, torch.from_numpy(by.copy()) if weighted else None),
            dtype,
            one.shape,
        )
        errors[0] += float((by * (one - mine) ** 2).sum(dtype=np.float64))
        errors[1] += float((by * (one - other) ** 2).sum(dtype=np.float64))
    assert errors[0] <= MOST * errors[1], errors[0] / errors[1]
