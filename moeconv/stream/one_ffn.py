"""A dense FFN, or a shared expert, as a stock module of experts with one expert, which every token is routed to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.layer import Layer
from moeconv.stream.skeleton import Skeleton


class OneFfn(nn.Module):
    """The module `ffn` with its down projection as `down_proj` [1, H, I], which shares the memory of the weight."""

    def __init__(self, ffn: nn.Module, down: Tensor) -> None:
        super().__init__()
        self.ffn, self.down_proj, self.is_transposed = ffn, down.detach()[None], False

    def forward(self, hidden: Tensor, _index: Tensor, _weights: Tensor) -> Tensor:
        """The output of the FFN for `hidden` [T, H], which all go to the one expert with the weight 1."""
        out = self.ffn(hidden)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made


def one_ffn(skeleton: Skeleton, layer: Layer) -> OneFfn:
    """The FFN of a dense layer. Raises InputError where it has no plain down projection."""
    down = skeleton.owner(skeleton.model.ffn_name("down", layer=layer.index))
    return _one(skeleton, layer.ffn, down, skeleton.model.ffn_width)


def one_shared(skeleton: Skeleton, layer: Layer) -> OneFfn:
    """The shared expert of a layer. Raises InputError where it has no plain down projection."""
    down = skeleton.owner(skeleton.model.family.name("shared.down", layer=layer.index))
    return _one(skeleton, skeleton.parent(down), down, skeleton.model.shared_width)


def _one(skeleton: Skeleton, ffn: nn.Module, down: nn.Module, width: int) -> OneFfn:
    weight, shape = getattr(down, "weight", None), (skeleton.model.hidden_size, width)
    if not isinstance(weight, Tensor) or sorted(weight.shape) != sorted(shape):
        raise InputError(
            f"an FFN of {skeleton.model.family.model_type} has no down projection [{shape[0]}, {shape[1]}] in "
            "transformers",
            hint="Leave out --data: then the weights decide.",
        )
    turned = not isinstance(down, nn.Linear) and tuple(weight.shape) != shape
    return OneFfn(ffn, weight.mT if turned else weight)


def every_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(top_k_index int64 [T, 1], top_k_weights [T, 1]) with which all tokens go to the one expert."""
    index = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    return index, torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
