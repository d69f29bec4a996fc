"""Asks an OpenAI-compatible server through the `openai` package, in an environment of its own (environments.sh).

    run_openai.py ADDRESS < {"messages": [...], "prompt": text, "length": n}

Prints {"models": [id], "chat": {"text", "prompt_tokens", "finish"}, "streamed": text, "completion": text}.
"""

import json
import sys

from openai import OpenAI


def main() -> None:
    job = json.load(sys.stdin)
    client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
    models = [model.id for model in client.models.list()]
    greedy = {"model": models[0], "max_tokens": job["length"], "temperature": 0.0}
    chat = client.chat.completions.create(messages=job["messages"], **greedy)
    stream = client.chat.completions.create(messages=job["messages"], stream=True, **greedy)
    streamed = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    completion = client.completions.create(prompt=job["prompt"], **greedy)
    print(
        json.dumps(
            {
                "models": models,
                "chat": {
                    "text": chat.choices[0].message.content,
                    "prompt_tokens": chat.usage.prompt_tokens,
                    "finish": chat.choices[0].finish_reason,
                },
                "streamed": streamed,
                "completion": completion.choices[0].text,
            }
        )
    )


main()
