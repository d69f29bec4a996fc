"""Greedy tokens and log-probabilities of checkpoints by vLLM, in an environment of its own (environments.sh).

    run_vllm.py < {"model": path, "prompts": [[id]], "length": n, "dtype": "bfloat16"}

One job per line. For each prints a line: {"tokens": [[id]], "logprobs": [[float]]}, the greedy continuation of every
prompt and the log-probability of every token of a prompt but its first; or {"failed": its last words}. `plain` names
operations that run in torch in place of vLLM's own kernels.
"""

import gc
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def answer(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=job["model"], dtype=job.get("dtype", "bfloat16"), enforce_eager=True, max_model_len=256,
        skip_tokenizer_init=True, compilation_config={"custom_ops": [f"-{name}" for name in job.get("plain", ())]},
    )  # fmt: skip
    rule = SamplingParams(
        temperature=0.0, max_tokens=job["length"], ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], rule, use_tqdm=False)
    scores = [
        [at[token].logprob for at, token in zip(a.prompt_logprobs[1:], a.prompt_token_ids[1:], strict=True)]
        for a in answers
    ]
    return {"tokens": [list(a.outputs[0].token_ids) for a in answers], "logprobs": scores}


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to both streams
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # what a runtime refuses is a row of the table
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        os.write(out, (json.dumps(found) + "\n").encode())
        gc.collect()
        cleanup_dist_env_and_memory()
    os._exit(0)


if __name__ == "__main__":
    main()
