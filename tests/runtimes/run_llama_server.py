"""llama.cpp's server for a GGUF file, in an environment of its own (environments.sh).

    run_llama_server.py MODEL

Prints the address that it listens on, and serves until its standard input is closed.
"""

import os
import sys

import xllamacpp


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # llama.cpp logs to both streams
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.use_jinja = True
    # float32 throughout, so that greedy answers can be compared
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    os.write(out, f"{server.listening_address}\n".encode())
    sys.stdin.read()
    os._exit(0)  # its threads do not end by themselves


main()
