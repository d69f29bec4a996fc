"""Greedy tokens and log-probabilities of a GGUF file by llama.cpp, in an environment of its own (environments.sh).

    run_llama_cpp.py < {"model": path, "prompts": [[id]], "length": n, "texts": [], "vocabulary": n, "float32": bool}

Prints {"tokens": [[id]], "texts": [[id]], "logprobs": [[[id, float]]]}: the greedy continuation of every prompt, every
text tokenized, and with `vocabulary` the log-probabilities of all tokens after every prompt. `float32`: keys and values
are cached in float32, and attention is not fused, so that only float32 weights are rounded.
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
    params.model.path = job["model"]
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    if job.get("float32"):
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict) -> dict:
        request = Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as answer:
            return json.load(answer)

    greedy = {"temperature": 0.0, "return_tokens": True, "ignore_eos": True, "n_predict": job["length"]}
    tokens = [ask("/completion", {"prompt": prompt, **greedy})["tokens"] for prompt in job["prompts"]]
    texts = [ask("/tokenize", {"content": text, "add_special": False})["tokens"] for text in job["texts"]]
    scores = []
    for prompt in job["prompts"] if job.get("vocabulary") else []:
        body = {"prompt": prompt, **greedy, "n_predict": 1, "n_probs": job["vocabulary"]}
        first = ask("/completion", body)["completion_probabilities"][0]
        # null for one so improbable that it rounds to nothing
        scores.append([[t["id"], t["logprob"]] for t in first["top_logprobs"] if t["logprob"] is not None])
    os.write(out, json.dumps({"tokens": tokens, "texts": texts, "logprobs": scores}).encode())
    os._exit(0)  # its threads do not end by themselves


main()
