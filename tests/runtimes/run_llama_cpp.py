"""Greedy tokens of a GGUF file by llama.cpp: run_llama_cpp.py MODEL < {"prompts": [[id]], "length": n, "texts": []}.

Runs in an environment of its own (environments.sh). Prints {"tokens": [[id]], "texts": [[id]]}: the continuation of
every prompt, and every text tokenized.
"""

import json
import os
import sys
from urllib.request import Request, urlopen

import xllamacpp


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # llama.cpp logs to both streams
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict) -> dict:
        request = Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as answer:
            return json.load(answer)

    greedy = {"n_predict": job["length"], "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
    tokens = [ask("/completion", {"prompt": prompt, **greedy})["tokens"] for prompt in job["prompts"]]
    texts = [ask("/tokenize", {"content": text, "add_special": False})["tokens"] for text in job["texts"]]
    os.write(out, json.dumps({"tokens": tokens, "texts": texts}).encode())
    os._exit(0)  # its threads do not end by themselves


main()
