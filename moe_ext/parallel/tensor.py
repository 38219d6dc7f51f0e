"""Tensor with sequence parallelism, from outside: tp ranks share every matrix and, between the modules, the tokens.

Between the modules a rank holds S/tp consecutive tokens of each sequence (of its part, where sp ranks share it), so
norms, router and dropout do a part of the work. Attention, MLPs and head compute on the whole, with some of the columns
(Megatron-LM; Korthikanti et al.):

    [B,S/tp,D] -> gather -> q, k, v | gate, up: rows of W -> .. o | down: columns of W -> reduce_scatter -> [B,S/tp,D]
    embedding, head: rows of the vocabulary (moe_ext.parallel.vocabulary)

Parameters become DTensors over tp, sharded where the table says and replicated elsewhere. Activations stay ordinary
tensors: while a module runs, its parameters are shadowed by what this rank computes with. A replicated parameter's
gradient is then this rank's part; `sum_replicated` adds the parts once per step.
"""
import functools
import re

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_ext.layers.fused import MLP, Experts
from moe_ext.model import GPT, Attention, Block
from moe_ext.parallel.collectives import as_autocast, gather, reduce_scatter
from moe_ext.parallel.vocabulary import vocabulary_parallel_cross_entropy, vocabulary_parallel_embedding

# outputs of the layer, and inputs; of W or of the low-rank factor that has them
ROWS = re.compile(r"(^|\.)((q|k|v|gate|up)_proj\.(weight|lora_B)|(embed_tokens|lm_head)\.weight)$")
COLUMNS = re.compile(r"(^|\.)(o|down)_proj\.(weight|lora_A)$")
SLICED = re.compile(r"(^|\.)((q|k|v|gate|up)_proj\.bias|sinks)$")   # replicated, each rank uses its outputs' part
ONCE = re.compile(r"(^|\.)(o|down)_proj\.bias$")                # replicated, rank 0 adds it


def tensor_parallel(model: nn.Module, mesh) -> None:
    """Spread a plain GPT, or a part of it, over mesh.dense's tp ranks; all but the experts. In place."""
    if any(getattr(module, "lora_dropout", 0) for module in model.modules()):
        raise ValueError("parallelize: LoRA's dropout with mesh.tp > 1, where a layer sees other ranks' tokens, whose "
                         "random numbers this rank does not know. Hint: dropout 0, or mesh.sp or mesh.fsdp")
    tp = mesh.dense["tp"]
    group = tp.get_group()
    rank, ranks = mesh.tp_rank, mesh.config.tp

    def placement(name):
        return Shard(0) if ROWS.search(name) else Shard(1) if COLUMNS.search(name) else Replicate()

    def used(name, local):
        if SLICED.search(name):
            return local.chunk(ranks)[rank]
        return local * (rank == 0) if ONCE.search(name) else local

    distribute(model, tp, lambda name: [placement(name)], used)
    for module in model.modules():
        if isinstance(module, Attention):
            whole_sequences(module, 1, group)
            for norm in (module.q_norm, module.k_norm) if module.wide_norm else ():
                norm.forward = functools.partial(width_norm, norm, rank, group)
        elif isinstance(module, MLP):           # token by token: the order in which they are gathered does not matter
            whole_sequences(module, 0, group)
        elif isinstance(module, Block):         # of the token mask and forced ids, if there are any, this rank's tokens
            module.register_forward_pre_hook(lambda _, args: (*args[:6], *(
                x if x is None else x.chunk(ranks, dim=1)[rank] for x in args[6:])))
    if isinstance(model, GPT):
        vocabulary = dict(vocab_size=model.config.vocab_size, group=group)
        embed, head = model.embed_tokens, model.lm_head
        if model.first:
            embed.forward = lambda tokens_BS: reduce_scatter(
                vocabulary_parallel_embedding(tokens_BS, embed.weight, **vocabulary), 1, group)
        if model.last:
            head.cross_entropy = functools.partial(vocabulary_parallel_cross_entropy, **vocabulary)
            head.register_forward_pre_hook(lambda _, args: (gather(as_autocast(args[0]), 1, group), *args[1:]))
        if model.embed_positions is not None:
            model.embed_positions.register_forward_hook(lambda _, args, x: x.chunk(ranks, dim=-2)[rank])


def whole_sequences(module: nn.Module, dim: int, group) -> None:
    """The module gets all ranks' tokens along `dim`; of its partial results the sum leaves, for this rank's tokens."""
    module.register_forward_pre_hook(lambda _, args: (gather(as_autocast(args[0]), dim, group), *args[1:]))
    module.register_forward_hook(lambda _, args, y: reduce_scatter(y, dim, group))


def width_norm(norm: nn.RMSNorm, rank: int, group, x):
    """RMSNorm over columns of which each rank of the group has a part, as x is this rank's."""
    dtype, x = x.dtype, x.to(norm.weight.dtype)     # not autocast's
    sums = gather(x.square().sum(-1, keepdim=True), -1, group)
    mean = sums.sum(-1, keepdim=True) / norm.weight.shape[0]
    return (x * torch.rsqrt(mean + norm.eps) * norm.weight.chunk(sums.shape[-1])[rank]).to(dtype)


def distribute(root: nn.Module, device_mesh, placements, used) -> None:
    """Make root's parameters, all but those of Experts inside it, DTensors with placements(name) on `device_mesh`.

    While a module runs, it sees used(name, local tensor) in their stead. A tied parameter stays tied.
    """
    made = {}
    experts = [module for module in root.modules() if isinstance(module, Experts) and module is not root]
    inside = {id(part) for module in experts for part in module.modules()}
    for prefix, module in root.named_modules():
        if id(module) in inside:
            continue
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        names = {name: f"{prefix}.{name}".lstrip(".") for name, _ in own}
        for name, full_name in names.items():
            p = module.get_parameter(name)
            if id(p) not in made:
                made[id(p)] = nn.Parameter(distribute_tensor(p.detach(), device_mesh, placements(full_name),
                                                             src_data_rank=None), requires_grad=p.requires_grad)
            module.register_parameter(name, made[id(p)])
        if names:
            compute_on_local(module, names, used)


def compute_on_local(module: nn.Module, names: dict[str, str], used) -> None:
    """An instance attribute hides the parameter of its name from `self.name` inside forward."""
    def hide(module, args):
        for name, full_name in names.items():
            p = module.get_parameter(name)
            module.__dict__[name] = used(full_name, p.to_local() if isinstance(p, DTensor) else p)

    def show(module, args, result):
        for name in names:
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(hide)
    module.register_forward_hook(show, always_call=True)


def sum_replicated(model: nn.Module, mesh) -> None:
    """After the last backward of a step: add up the tp (etp) ranks' parts of the replicated parameters' gradients."""
    for axis in ("tp", "etp"):
        if getattr(mesh.config, axis) > 1:
            parts = [p.grad.to_local() for p in model.parameters() if p.grad is not None and replicated(p, axis)]
            group = (mesh.dense if axis == "tp" else mesh.sparse).get_group(axis)
            for dtype in dict.fromkeys(part.dtype for part in parts):       # in one order on all ranks
                same = [part for part in parts if part.dtype == dtype]
                flat = torch.cat([part.flatten() for part in same])
                dist.all_reduce(flat, group=group)
                for part, sum in zip(same, flat.split([part.numel() for part in same]), strict=True):
                    part.copy_(sum.view_as(part))


def replicated(p, axis: str) -> bool:
    names = p.device_mesh.mesh_dim_names
    return axis in names and p.placements[names.index(axis)].is_replicate()
