"""MODEL from the hub, against a stand-in server: only what is needed is fetched, once, and offline the cache serves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import make_dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_handler(folder, fetched):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, data, *, status=200, headers=()):
            self.send_response(status)
            for name, value in (("Content-Length", str(len(data))), *headers):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self):
            path = self.path.partition("?")[0]
            base = "/api/models/someone/tiny"
            if path.startswith(f"{base}/revision/"):
                known = path.rpartition("/")[2] in ("main", "v1", COMMIT)
                if not known:
                    return self.answer(b"{}", status=404, headers=[("X-Error-Code", "RevisionNotFound")])
                return self.answer(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode())
            if path.startswith(f"{base}/tree/"):
                files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
                rows = [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size,
                     "oid": hashlib.sha1(f.read_bytes()).hexdigest()}
                    for f in files
                ]  # fmt: skip
                return self.answer(json.dumps(rows).encode())
            _, _, name = path.partition(f"/someone/tiny/resolve/{COMMIT}/")
            file = folder / name
            if not name or not file.is_file():
                return self.answer(b"{}", status=404, headers=[("X-Error-Code", "RepoNotFound")])
            if self.command == "GET":
                fetched.append(name)
            data = file.read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            return self.answer(data, headers=[("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT)])

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def hub(tmp_path):
    """(environment of a command that sees only this hub, its folder, names of the files that were fetched)"""
    folder, fetched = tmp_path / "served", []
    make_dense(folder, "llama", shards=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(folder, fetched))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    yield environment | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}, folder, fetched
    server.shutdown()


def moeconv(environment, *arguments):
    command = [sys.executable, "-m", "moeconv", *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_only_what_a_conversion_needs_is_fetched_and_only_once(tmp_path, hub):
    environment, _, fetched = hub
    code, _, err = moeconv(environment, "upcycle", "hf://someone/tiny", tmp_path / "moe", "--no-check")
    assert code == 0, err
    assert sorted(fetched) == sorted(
        [
            "README.md",
            "config.json",
            "model.safetensors.index.json",
            *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        ]
    )
    assert "\x1b" not in err and "\r" not in err
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "base_model: someone/tiny" in card and "license: mit" in card
    code, _, _ = moeconv(environment | {"HF_HUB_OFFLINE": "1"}, "inspect", "hf://someone/tiny@main")
    assert code == 0 and len(fetched) == 5


@pytest.mark.slow
def test_templates_and_the_code_that_a_tokenizer_is_are_fetched(tmp_path, hub):
    environment, folder, fetched = hub
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    (folder / "tiktoken.model").write_bytes(b"aGk= 0")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_tiny.T", null]}}')
    (folder / "original" / "other.py").write_text("")
    code, done, err = moeconv(environment, "upcycle", "hf://someone/tiny", tmp_path / "moe", "--no-check")
    assert code == 0, err
    added = {"additional_chat_templates/rag.jinja", "tiktoken.model", "tokenizer_config.json", "modeling_tiny.py"}
    assert added <= set(fetched) and added <= set(done["files"]) and "original/other.py" not in fetched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hf://someone/tiny@nothing", 3),
        ("hf://someone/missing", 3),
        ("hf://someone", 2),
        ("hf://a/b/c", 2),
        ("someone/tiny", 3),
    ],
)
def test_a_name_that_the_hub_does_not_have_is_refused(tmp_path, hub, name, code):
    environment, _, fetched = hub
    found, result, _ = moeconv(environment, "inspect", name)
    assert found == code and result["error"]["message"] and fetched == []


@pytest.mark.slow
def test_what_is_not_in_the_cache_is_refused_offline(tmp_path, hub):
    environment, _, fetched = hub
    code, result, _ = moeconv(environment | {"HF_HUB_OFFLINE": "1"}, "inspect", "hf://someone/tiny")
    assert code == 3 and "hf://someone/tiny" in result["error"]["message"] and fetched == []


@pytest.mark.slow
def test_an_index_that_points_elsewhere_fetches_nothing_from_there(tmp_path, hub):
    environment, folder, fetched = hub
    index = Path(folder / "model.safetensors.index.json")
    index.write_text(
        json.dumps({"weight_map": {"x": "../../secret.safetensors", "y": "https://example.com/z.safetensors"}})
    )
    code, _, _ = moeconv(environment, "inspect", "hf://someone/tiny")
    assert code == 3 and not any("secret" in name or "example" in name for name in fetched)
