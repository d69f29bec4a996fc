"""A whole stock model in float32, loaded from its checkpoint and frozen, with access to its MoE blocks.

Several processes share its decoder layers (FSDP2, sharded one by one as they are read); each has the rest whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.stream.skeleton import Skeleton, Stock
from moeconv.tensors import decode_weight, plain_names
from moeconv.tune.routing import Block
from moeconv.tune.words import correction_names, tensors_of
from moeconv.world import current


@dataclass(frozen=True, eq=False)
class Network:
    """A causal language model in two halves: tokens -> final hidden states -> logits."""

    module: Stock
    blocks: Sequence[Block]
    named: dict[str, nn.Parameter]  # by name on disk; the fused experts are in `blocks`

    @property
    def vocabulary(self) -> int:
        return int(self.module.get_output_embeddings().weight.shape[0])

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] -> final hidden states [B, S, H]."""
        return self.module.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [R, H] -> logits [R, V], by the stock forward, because some classes scale or cap the
        logits. The decoder is replaced by a function that returns `hidden`."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        decoder = self.module.get_decoder()
        output = hidden[None].clone()  # FSDP2 warns of a view
        decoder.forward = lambda *_args, **_kwargs: MoeModelOutputWithPast(last_hidden_state=output)
        try:
            return self.module(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del decoder.forward  # restores the method of the class


def load_network(model: Model, *, device: torch.device, train: tuple[str, ...] = ()) -> Network:
    """Load every weight in float32 on `device`; packed weights are decoded. `train` are the words of --train for what
    will have a gradient, which FSDP2 must know when it shards. Raises InputError unless the model loads strictly."""
    skeleton = Skeleton(model, dtype=torch.float32, device=device)
    opened = {skeleton.place(name) for name in tensors_of(model, train) if name in model.roles}
    by_layer: dict[int | None, list[str]] = {}
    for name, layer in plain_names(model):
        by_layer.setdefault(layer, []).append(name)
    for layer, names in by_layer.items():
        under = "" if layer is None else skeleton.name_of(skeleton.layers[layer]) + "."
        skeleton.fill(_decoded(model, names), under=under)
        if layer is not None and current().size > 1:
            _shard_layer(skeleton, layer, opened=opened)
    for layer in model.moe_layers:
        _unfold(skeleton, layer)
    skeleton.tie()
    if current().size > 1:
        _shard_rest(skeleton)
    else:
        skeleton.module.requires_grad_(False)
    if empty := [name for name, p in skeleton.module.named_parameters() if p.is_meta]:
        raise InputError(f"the checkpoint has no tensor for {empty[0]}", hint="A shard is missing. Copy it again.")
    names = [
        n for n, _ in plain_names(model) if model.roles.get(n) and model.roles[n].group in ("norm", "shared", "ffn")
    ]
    return Network(
        skeleton.module,
        [block_of(skeleton, layer) for layer in model.moe_layers],
        _named(skeleton, names),
    )


def _shard_layer(skeleton: Skeleton, layer: int, *, opened: set[str]) -> None:
    """Keep a share of each parameter of a layer in this process. Correction biases have no gradient and stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    part = skeleton.layers[layer]
    for name, parameter in part.named_parameters(prefix=skeleton.name_of(part)):
        parameter.requires_grad_(name in opened)
    bias = correction_names(skeleton.model).get(layer)
    kept = {p for n, p in skeleton.module.named_parameters() if bias is not None and n == skeleton.place(bias)}
    for parameter in kept:
        parameter.requires_grad_(False)
    fully_shard(part, mesh=init_device_mesh(skeleton.device.type, (current().size,)), ignored_params=kept)


def _shard_rest(skeleton: Skeleton) -> None:
    """Make the decoder the FSDP2 root, which schedules the transfers of its layers. Everything outside of the layers
    stays whole in every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = {p for p in skeleton.module.parameters() if not hasattr(p, "to_local")}
    for parameter in whole:
        parameter.requires_grad_(False)
    mesh = init_device_mesh(skeleton.device.type, (current().size,))
    fully_shard(skeleton.decoder, mesh=mesh, ignored_params=whole)


def _named(skeleton: Skeleton, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """{name on disk: parameter} for tensors that are a parameter of their own in memory, not a part of a fused one."""
    found = {name: skeleton.module.get_parameter(skeleton.place(name)) for name in names}
    shapes = skeleton.model.checkpoint.tensors
    return {name: p for name, p in found.items() if tuple(p.shape) == shapes[name].shape}


def block_of(skeleton: Skeleton, layer: int) -> Block:
    """The router and experts of a layer, found through the names of its tensors. Raises InputError if the class of
    transformers does not have the fused experts that this module expects."""
    model = skeleton.model
    experts: Stock = skeleton.owner(model.expert_name("gate", layer=layer, expert=0))
    plain = not (getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False))
    if not (plain and hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj")):
        raise InputError(
            f"the {model.family.model_type} class of transformers does not fuse its experts as this version expects",
            hint="Is the installed transformers in the range that moeconv's requirements name?",
        )
    router = skeleton.owner(model.router_name(layer))
    return Block(layer, router, experts, _correction(skeleton, layer), router_scale(model))


def router_scale(model: Model) -> float:
    """The factor by which the rows of the routers were multiplied when they were written, from the manifest; usually
    1."""
    steps = (model.checkpoint.manifest or {}).get("steps")
    for step in reversed(steps if isinstance(steps, list) else []):
        parameters = step.get("parameters") if isinstance(step, dict) else None
        scale = parameters.get("router_scale") if isinstance(parameters, dict) else None
        if isinstance(scale, int | float) and 0 < scale <= 1:
            return float(scale)
    return 1.0


def _unfold(skeleton: Skeleton, layer: int) -> None:
    """Multiply the inputs of the router by the scale instead of its rows: the logits are the same, and the gradients
    have an ordinary size."""
    scale = router_scale(skeleton.model)
    if scale != 1:
        router = skeleton.owner(skeleton.model.router_name(layer))
        router.register_forward_pre_hook(lambda _, args: (args[0] * scale, *args[1:]))


def _correction(skeleton: Skeleton, layer: int) -> Tensor | None:
    """A layer's correction bias in memory: a buffer in most families, a parameter in some."""
    name = correction_names(skeleton.model).get(layer)
    if name is None:
        return None
    owner, _, leaf = skeleton.place(name).rpartition(".")
    found: Tensor = getattr(skeleton.module.get_submodule(owner), leaf)
    return found.data


@dataclass(frozen=True, eq=False)
class FilledBlock:
    """The loaded FFN of a layer: `module` takes [B, S, H]; `named` are the shared experts by name on disk."""

    block: Block
    module: Stock
    named: dict[str, nn.Parameter]


def fill_block(skeleton: Skeleton, layer: int) -> FilledBlock:
    """Load only the FFN of one layer."""
    model = skeleton.model
    block = block_of(skeleton, layer)
    name = skeleton.name_of(block.experts).rpartition(".")[0]
    groups = ("router", "expert", "shared")
    wanted = [n for n, role in model.roles.items() if role.layer == layer and role.group in groups]
    skeleton.fill(_decoded(model, wanted), under=name + ".")
    module = skeleton.module.get_submodule(name)
    module.requires_grad_(False)
    _unfold(skeleton, layer)
    block = block_of(skeleton, layer)  # now with the loaded bias
    return FilledBlock(block, module, _named(skeleton, [n for n in wanted if model.roles[n].group == "shared"]))


def _decoded(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """Decoded weights by name. The rows of a router are divided by the scale that they were written with."""
    scale = router_scale(model)
    found = {name: decode_weight(model, name) for name in names}
    for name in found if scale != 1 else ():
        if (role := model.roles.get(name)) and role.key == "router.weight":
            found[name] = found[name].float() / scale
    return found
