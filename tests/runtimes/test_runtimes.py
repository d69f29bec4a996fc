"""Every format in the runtimes that it is for, on the demo checkpoint made a Mixture-of-Experts.

transformers always; vLLM and llama.cpp where MOECONV_VLLM_PYTHON and MOECONV_LLAMA_CPP_PYTHON name their interpreters.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import agreement as runtimes

from moeconv.quantize.gguf.pre_tokenizers import NAMES
from moeconv.recipe.read import DEMO_DATA

# Share of greedy tokens that must be the reference's choice too, and the most (in logits) by which it may have
# preferred another. vLLM and llama.cpp round activations otherwise, and the demo's untrained router is often nearly
# tied: it then picks another expert.
LIMITS = {"transformers": (1.0, 0.0), "vllm": (0.85, 6.0), "llama.cpp": (0.85, 6.0)}
CASES = [(name, parameters, runtime) for name, parameters, tried in runtimes.ROWS for runtime in tried]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return runtimes.moe_source(DEMO_DATA / "model", tmp_path_factory.mktemp("moe") / "moe")


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(
    ("name", "parameters", "runtime"),
    CASES,
    ids=[f"{name} in {runtime}".replace(" ", "-") for name, _, runtime in CASES],
)
def test_runtime_computes_what_the_dequantized_model_does(tmp_path, source, name, parameters, runtime):
    variable = runtimes.RUNTIMES.get(runtime)
    if variable is not None and variable not in os.environ:
        pytest.skip(f"{variable} is not set: tests/runtimes/environments.sh builds it")
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    runtimes.quantize(source, packed, parameters)
    runtimes.dequantized(source, packed, plain, parameters)
    try:
        found = runtimes.agreement(runtime, packed, plain, runtimes.prompts(source))
    except RuntimeError as error:
        assert name in runtimes.REFUSED.get(runtime, ()), error
        return
    assert name not in runtimes.REFUSED.get(runtime, ()), f"{runtime} loads {name} by now: say so in its format"
    share, gap = LIMITS[runtime]
    assert found["agreement"] >= share and found["gap"] <= gap, found


@pytest.mark.skipif("MOECONV_LLAMA_CPP_PYTHON" not in os.environ, reason="MOECONV_LLAMA_CPP_PYTHON is not set")
@pytest.mark.parametrize("family", sorted(runtimes.LLAMA_CPP_FAMILIES))
def test_every_family_that_gguf_is_written_for(tmp_path, family):
    """Random models, so that nothing is right by chance: Q8_0 experts against the decoded weights in float32."""
    source = runtimes.random_model(family, tmp_path / "source")
    parameters = {"format": "gguf", "scheme": "q8_0"}
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    runtimes.quantize(source, packed, parameters)
    runtimes.dequantized(source, packed, plain, parameters)
    found = runtimes.agreement("llama.cpp", packed, plain, runtimes.prompts(source))
    assert found["agreement"] >= 0.85, found


SPLITS = [(steps, name, whole) for steps, names in NAMES.items() for name, whole in names]
KINDS = ["byte-level", "sentencepiece", *(name for _, name, _ in SPLITS)]


@pytest.mark.slow(keep=2)
@pytest.mark.skipif("MOECONV_LLAMA_CPP_PYTHON" not in os.environ, reason="MOECONV_LLAMA_CPP_PYTHON is not set")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_tokenizes_texts_as_transformers_does(tmp_path, kind):
    from tokenizers import Tokenizer

    source = runtimes.random_model("mixtral", tmp_path / "source")
    if kind == "sentencepiece":
        runtimes.sentencepiece(source)
    for steps, name, whole in SPLITS:
        if name == kind:
            runtimes.byte_level(source, steps, whole=whole)
    runtimes.quantize(source, tmp_path / "packed", {"format": "gguf", "scheme": "q8_0"})
    text = (DEMO_DATA / "heldout.txt").read_text()
    texts = [text[at : at + 500] for at in range(0, 20_000, 500)]
    texts += [
        "  two  spaces\n\n\ttab",
        "\u00e9migr\u00e9 \u65e5\u672c\u8a9e \U0001f642",
        " in front",
        "behind ",
        "12345",
        "It's THEY'LL we'Re IT'S don't  a1b22c333d4444 1,234,567.89 x=-1.5e10",
        "CamelCaseHTTPServer snake_case foo.bar(baz[0])->qux; // comment/path\r\n\r\n  \n x",
        "na\u00efve Stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u0939\u093f\u0928\u094d\u0926\u0940 \u3072123",
        "!!! ... ??? $$$ ### (a) [b] {c} <d>   \t end",
    ]
    reference = Tokenizer.from_file(str(source / "tokenizer.json"))
    wanted = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert runtimes.texts_elsewhere(tmp_path / "packed", texts) == wanted
