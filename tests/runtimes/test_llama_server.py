"""A GGUF of ours in llama.cpp's server, asked through the OpenAI API: the chat template is used, and the answers are
those of transformers.

MOECONV_LLAMA_CPP_PYTHON names the interpreter with the server; with MOECONV_OPENAI_PYTHON (the package `openai`) it is
asked through that client too (environments.sh).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeconv.recipe.read import DEMO_DATA

HERE = Path(__file__).parent
SERVER, CLIENT = "MOECONV_LLAMA_CPP_PYTHON", "MOECONV_OPENAI_PYTHON"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER not in os.environ, reason=f"{SERVER} is not set"),
]
# the demo model writes Python, so the turn of the assistant begins as code does
TEMPLATE = (
    "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}def test_{% endif %}"
)
MESSAGES = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Write a test."}]
PROMPT, LENGTH = "import os", 12


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """An upcycled model in float32, with a chat template."""
    folder = tmp_path_factory.mktemp("served")
    dense = shutil.copytree(DEMO_DATA / "model", folder / "dense")
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    (dense / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    moeconv("upcycle", dense, folder / "demo-chat", "--method", "drop", "--experts", "4", "--dtype", "float32", "-q")
    return folder / "demo-chat"


@pytest.fixture(scope="module")
def address(moe) -> Iterator[str]:
    """Where the server listens that has the GGUF file of the model."""
    moeconv("quantize", moe, moe.parent / "gguf", "--format", "gguf", "--scheme", "f32",
            "--file-name", "demo-chat-{type}", "-q")  # fmt: skip
    (file,) = (moe.parent / "gguf").glob("*.gguf")
    assert file.name == "demo-chat-F32.gguf"
    command = [os.environ[SERVER], HERE / "run_llama_server.py", file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate(timeout=60)


def moeconv(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "moeconv", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return json.load(answer)


def written(moe: Path, ids: list[int]) -> str:
    """The greedy continuation by transformers."""
    model = AutoModelForCausalLM.from_pretrained(moe, dtype="auto", experts_implementation="eager")
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=LENGTH, eos_token_id=None
    )  # fmt: skip
    return str(AutoTokenizer.from_pretrained(moe).decode(made[0, len(ids) :]))


def asked(moe: Path) -> tuple[str, list[int]]:
    """The conversation as the chat template writes it, and its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(moe)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return text, tokenizer(text)["input_ids"]


def test_the_chat_template_is_used_and_the_answer_is_that_of_transformers(moe, address):
    text, ids = asked(moe)
    assert ask(f"{address}/apply-template", {"messages": MESSAGES})["prompt"] == text
    greedy = {"max_tokens": LENGTH, "temperature": 0.0}
    answer = ask(f"{address}/v1/chat/completions", {"messages": MESSAGES, **greedy})
    print("POST /v1/chat/completions", json.dumps(answer["choices"]), json.dumps(answer["usage"]))
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    wanted = written(moe, ids)
    assert answer["choices"][0]["message"]["content"].strip() == wanted.strip() != ""
    completed = ask(f"{address}/v1/completions", {"prompt": PROMPT, **greedy})
    continued = written(moe, AutoTokenizer.from_pretrained(moe)(PROMPT)["input_ids"])
    assert completed["choices"][0]["text"] == continued


@pytest.mark.skipif(CLIENT not in os.environ, reason=f"{CLIENT} is not set")
def test_through_the_openai_client(moe, address):
    job = {"messages": MESSAGES, "prompt": PROMPT, "length": LENGTH}
    done = subprocess.run(
        [os.environ[CLIENT], HERE / "run_openai.py", address], input=json.dumps(job), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print("openai:", done.stdout)
    found = json.loads(done.stdout)
    _, ids = asked(moe)
    assert found["chat"]["prompt_tokens"] == len(ids)
    assert found["chat"]["text"].strip() == written(moe, ids).strip() != ""
    assert found["streamed"] == found["chat"]["text"] and found["chat"]["finish"] in ("length", "stop")
    assert found["completion"] and len(found["models"]) == 1
