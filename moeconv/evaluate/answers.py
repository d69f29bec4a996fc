"""The log-probability of every choice, computed layer by layer; the output head reads only the positions that count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.evaluate.encode import Encoded
from moeconv.stream.layers import LayerStream


@dataclass(frozen=True, eq=False)
class Answers:
    """For every choice: the sum of the log-probabilities of its tokens in nats, float64 [n], and whether each of its
    tokens is the most likely one, bool [n]."""

    logs: np.ndarray
    greedy: np.ndarray


@torch.no_grad()
def answers_of(stream: LayerStream, asked: Encoded) -> Answers:
    """The answers of a stream whose layers were all run on `asked.inputs`."""
    logs, best = np.zeros(len(asked.targets)), np.zeros(len(asked.targets), bool)
    step = asked.inputs.longest
    with stream.head_loaded():
        for start in range(0, len(asked.targets), step):
            part = slice(start, start + step)
            logits = _logits(stream, torch.from_numpy(asked.places[part]))
            wanted = torch.from_numpy(asked.targets[part]).to(logits.device)
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logs[part] = (chosen.double() - logits.logsumexp(-1).double()).cpu().numpy()
            best[part] = (logits.argmax(-1) == wanted).cpu().numpy()
    firsts = asked.bounds[:-1]
    return Answers(np.add.reduceat(logs, firsts), np.logical_and.reduceat(best, firsts))


def _logits(stream: LayerStream, places: Tensor) -> Tensor:
    """float32 logits [n, V] at `places` int64 [n] of the tokens."""
    hidden = stream.hidden[places].to(stream.device)[None]
    return stream.tail(hidden, stream.windows[places].to(stream.device)[None])[0].float()
