"""A whole stock model in float32, filled from its checkpoint and frozen, with its Mixture-of-Experts blocks at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.calibrate.skeleton import Skeleton
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.tensors import decode_weight, plain_names
from moeconv.tune.routing import Block


@dataclass(frozen=True, eq=False)
class Network:
    """A causal language model in two halves: tokens -> final hidden states -> logits."""

    module: Any
    blocks: Sequence[Block]
    named: dict[str, nn.Parameter]  # by name on disk; experts, which are fused, are in `blocks`

    @property
    def vocabulary(self) -> int:
        return int(self.module.get_output_embeddings().weight.shape[0])

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] -> final hidden states [B, S, H]."""
        return self.module.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [R, H] -> logits [R, V], by the stock forward: some classes scale or cap what the output
        embeddings give. The decoder is left out of it: it answers with `hidden`."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        decoder = self.module.get_decoder()
        decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden[None])
        try:
            return self.module(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del decoder.forward  # the class's own comes back


def load_network(model: Model, *, device: torch.device) -> Network:
    """Every weight in float32 on `device`, decoded where it is packed. Raises InputError unless it loads strictly."""
    skeleton = Skeleton(model, dtype=torch.float32, device=device)
    by_layer: dict[int | None, list[str]] = {}
    for name, layer in plain_names(model):
        by_layer.setdefault(layer, []).append(name)
    for layer, names in by_layer.items():
        under = "" if layer is None else skeleton.name_of(skeleton.layers[layer]) + "."
        skeleton.fill(_decoded(model, names), under=under)
    skeleton.tie()
    skeleton.module.requires_grad_(False)
    if empty := [name for name, p in skeleton.module.named_parameters() if p.is_meta]:
        raise InputError(f"the checkpoint has nothing for {empty[0]}", hint="A shard is missing.")
    names = [n for n, _ in plain_names(model) if model.roles.get(n) and model.roles[n].group in ("norm", "shared")]
    return Network(
        skeleton.module,
        [block_of(skeleton, layer) for layer in model.moe_layers],
        _named(skeleton, names),
    )


def _named(skeleton: Skeleton, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters behind tensors that stand alone in memory as on disk, not joined with others."""
    found = {name: skeleton.module.get_parameter(skeleton.place(name)) for name in names}
    shapes = skeleton.model.checkpoint.tensors
    return {name: p for name, p in found.items() if tuple(p.shape) == shapes[name].shape}


def block_of(skeleton: Skeleton, layer: int) -> Block:
    """The router and experts of a layer, found through the names of its tensors on disk."""
    model = skeleton.model
    experts: Any = skeleton.owner(model.expert_name("gate", layer=layer, expert=0))
    plain = not (getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False))
    if not (plain and hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj")):
        raise InputError(
            f"the {model.family.model_type} class of transformers does not fuse its experts as this version expects",
            hint="Is the installed transformers in the range that moeconv's requirements name?",
        )
    return Block(layer, skeleton.owner(model.router_name(layer)), experts)


@dataclass(frozen=True, eq=False)
class FilledBlock:
    """A layer's FFN with its weights in place: `module` takes [B, S, H]; `named` are shared experts by name on disk."""

    block: Block
    module: Any
    named: dict[str, nn.Parameter]


def fill_block(skeleton: Skeleton, layer: int) -> FilledBlock:
    """Fill the FFN of one layer alone."""
    model = skeleton.model
    block = block_of(skeleton, layer)
    name = skeleton.name_of(block.experts).rpartition(".")[0]
    groups = ("router", "expert", "shared")
    wanted = [n for n, role in model.roles.items() if role.layer == layer and role.group in groups]
    skeleton.fill(_decoded(model, wanted), under=name + ".")
    module = skeleton.module.get_submodule(name)
    module.requires_grad_(False)
    return FilledBlock(block, module, _named(skeleton, [n for n in wanted if model.roles[n].group == "shared"]))


def _decoded(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: decode_weight(model, name) for name in names}
