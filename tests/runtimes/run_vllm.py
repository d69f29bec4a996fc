"""Greedy tokens of a checkpoint by vLLM: run_vllm.py MODEL < {"prompts": [[id]], "length": n}.

Runs in an environment of its own (environments.sh). Prints {"tokens": [[id]]}: the continuation of every prompt.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to both streams
    from vllm import LLM, SamplingParams

    model = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True)
    rule = SamplingParams(temperature=0.0, max_tokens=job["length"], ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], rule, use_tqdm=False)
    os.write(out, json.dumps({"tokens": [list(a.outputs[0].token_ids) for a in answers]}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
