"""A plain model on a mesh, from outside: tensor, sequence and expert parallelism, then FSDP2 around what they leave.

    mesh = Mesh(config.mesh, device)
    model = GPT(config.model, device="meta")        # or with values, the same on every rank
    parallelize(model, mesh)
    initialize(model, config.train.seed, device)    # what one process draws, box by box; not with values
    loss, aux = backward(model, model(tokens, targets, draws), mesh, tokens=tokens_of_the_step)

Experts: Shard(0) over ep, F over etp. FSDP shards a dimension that tp, ep and etp leave alone, so that each rank holds
one box of a parameter. It sums gradients and divides nothing: the loss already has the global denominators.
"""
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_ext.config import Config
from moe_ext.layers.fused import FusedMoE
from moe_ext.model import GPT, Block, Losses, half_dtype, normal_, parameter_dtype, set_recomputation
from moe_ext.model import build as plain_build
from moe_ext.parallel.experts import ExpertExchange, SplitExperts
from moe_ext.parallel.init import box_normal
from moe_ext.parallel.mesh import Mesh, ScopePeers
from moe_ext.parallel.sequence import sequence_parallel
from moe_ext.parallel.stages import Stage, cut
from moe_ext.parallel.tensor import ROWS, distribute, sum_replicated, tensor_parallel
from moe_ext.parallel.trace import TracedExchange

WITHOUT_HIDDEN = "w13_lora_A", "w2_lora_B"      # of the experts' low-rank factors: no F to cut


def parallelize(model: nn.Module, mesh: Mesh, *, dtype: torch.dtype | None = None, trace: bool = False) -> None:
    """Spread a GPT, a Block or a FusedMoE over the mesh, in place. One process: nothing.

    dtype: in which the experts' weights travel and compute where that is less than theirs, as under autocast.
    trace: print and check every step of the token exchange.
    """
    c = mesh.config
    if mesh.world == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, FusedMoE)]
    for layer in layers:
        expert_parallel(layer, mesh, trace)
    if c.tp > 1:
        tensor_parallel(model, mesh)
    if c.sp > 1:
        sequence_parallel(model, mesh)
    policy = {}
    if dtype is not None:
        policy["mp_policy"] = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        shard(layer.experts, mesh.sparse, "efsdp", lambda name: experts_dim(name, c.etp), reshard_after_forward=True,
              **policy)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    theirs = {p for layer in layers for p in layer.experts.parameters()}
    for module in dict.fromkeys([*blocks, model]):
        shard(module, mesh.dense, "fsdp", lambda name: dense_dim(name, c.tp), ignored_params=theirs)


def expert_parallel(layer: FusedMoE, mesh: Mesh, trace: bool) -> None:
    """The layer's experts over ep and etp, its exchange between them, and its peers where a scope reaches beyond it."""
    c = mesh.config
    axes = [axis for axis in ("ep", "etp") if getattr(c, axis) > 1]
    if axes:
        def placements(name):
            # w13's bias is whole and sliced, w2's is whole and added by rank 0
            on = {"ep": Shard(0), "etp": Shard(2) if has_width(name) else Replicate()}
            return [on[axis] for axis in axes]

        def used(name, local):
            if c.etp > 1 and name == "w13_bias":
                return local.chunk(c.etp, dim=2)[mesh.etp_rank].contiguous()
            return local * (mesh.etp_rank == 0) if c.etp > 1 and name == "w2_bias" else local

        distribute(layer.experts, mesh.sparse[tuple(axes)], placements, used)
    if c.ep > 1:
        layer.exchange = ExpertExchange(layer.num_experts, mesh.transport)
        if trace:
            layer.exchange = TracedExchange(layer.exchange, layer.name)
    if c.etp > 1:
        layer.exchange = SplitExperts(mesh.sparse.get_group("etp"), layer.exchange)
    if (c.dp if layer.scope == "micro_batch" else 1) * c.sequence > 1:
        layer.peers = ScopePeers(mesh, layer.scope)


def dense_dim(name: str, tp: int) -> int:
    """The dimension of any other parameter that FSDP shards: not tp's."""
    return 1 if tp > 1 and ROWS.search(name) else 0


def has_width(name: str) -> bool:
    """Whether dimension 2 of an expert parameter is F, of which etp's ranks have parts: of both matrices, and of the
    factors beside it."""
    return not name.endswith(WITHOUT_HIDDEN) and "bias" not in name


def experts_dim(name: str, etp: int) -> int:
    """The dimension of an expert parameter that FSDP shards: neither ep's nor etp's."""
    return {"w13_E2FD": 2 if etp == 1 else 3, "w13_bias": 2, "w2_EDF": 1, "w2_bias": 1, "w13_lora_A": 2, "w2_lora_B": 1,
            "w13_lora_B": 2 if etp == 1 else 3, "w2_lora_A": 2 if etp == 1 else 1}[name]


def shard(module: nn.Module, device_mesh, axis: str, dim, **options) -> None:
    """fully_shard over (rep, axis), each parameter along dim(its name); gradients are summed, never averaged."""
    sizes = dict(zip(device_mesh.mesh_dim_names, device_mesh.shape, strict=True))
    if sizes["rep"] * sizes[axis] == 1:
        return
    names = {id(p): name for name, p in module.named_parameters()}

    def placement(p):
        cut = dim(names[id(p)])
        if cut and p.shape[cut] % sizes[axis]:
            raise ValueError(f"parallelize: {sizes[axis]} ranks ({axis}) cannot share dimension {cut} of "
                             f"{names[id(p)]} {list(p.shape)} evenly. Hint: of a low-rank factor, another rank")
        return Shard(cut)

    fully_shard(module, mesh=device_mesh["rep", axis] if sizes["rep"] > 1 else device_mesh[axis],
                shard_placement_fn=placement, **options)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)      # gloo has no PREMUL_SUM


def backward(model: nn.Module, out: Losses, mesh: Mesh, *, last: bool = True, **options):
    """The backward of a micro-batch, as `accumulate`; if it is the last of a step, the gradients are whole then."""
    parts = accumulate(model, out, mesh, last=last, **options)
    if last:
        sum_replicated(model, mesh)
    return parts


def accumulate(model: nn.Module, out: Losses, mesh: Mesh, *, tokens: int, accumulation: int = 1, last: bool = True,
               scale: float = 1.0, dx_BSD: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The backward of a micro-batch -> (token loss per token, auxiliary loss): this rank's parts, whose sums over all
    ranks and micro-batches are the step's.

    tokens: of the step, on all ranks and in all its `accumulation` micro-batches. last: of these; what is left then is
    sum_replicated. scale: of the loss, for fp16. Each sp rank has the token loss of its own tokens, while the tp ranks
    have the same, of which each counts its part; of the auxiliary loss every rank has the mean over its own scopes, so
    that the mean over the ranks is the whole. dx_BSD: of a piece without the head, the gradient of out.x_BSD (which may
    be a GradientEdge); it has the scale.
    """
    if mesh.config.rep > 1:
        model.set_requires_all_reduce(last)
    token_loss, aux_loss = out.token_loss / tokens, out.aux_loss / (accumulation * mesh.config.stage)
    loss = scale * (token_loss + aux_loss)
    roots = [(loss, None)] if loss.requires_grad else []
    roots += [(out.x_BSD, dx_BSD)] if dx_BSD is not None and out.x_BSD is not None else []
    if roots:       # a beginning of the model may be frozen
        torch.autograd.backward(*zip(*roots, strict=True))
    return token_loss.detach() / mesh.config.tp, aux_loss.detach()


def build(config: Config, mesh: Mesh) -> GPT | Stage:
    """The GPT of a run at its initial values, on its mesh; of a pipeline what this rank's stage has of it."""
    if mesh.world == 1:
        return plain_build(config)
    pieces = []
    for blocks in cut(config)[mesh.pp_rank::mesh.config.pp]:
        model = GPT(config.model, dtype=parameter_dtype(config), device="meta", blocks=blocks)
        parallelize(model, mesh, dtype=half_dtype(config), trace=config.log.trace_exchange)
        initialize(model, config.train.seed, mesh.device)
        set_recomputation(model, config.train)
        pieces.append(model)
    return pieces[0] if mesh.config.pp == 1 else Stage(pieces, mesh)


def initialize(model: GPT, seed: int, device) -> None:
    """Memory and initial values for a parallelized GPT from the meta device: every box as one process draws it."""
    model.to_empty(device=device)
    if model.config.tied and model.last:        # to_empty has given each its own
        model.lm_head.weight = model.embed_tokens.weight
    model.init_weights(seed, normal_box_)


def box_of(p: DTensor) -> tuple[list[int], list[int]]:
    """(start, size) of the part of p that this rank holds: each axis cuts a dimension as torch.chunk does. Errors:
    ValueError if an axis does otherwise, as FSDP does where tp has cut the same dimension."""
    start, size = [0] * p.ndim, list(p.shape)
    for placement, ranks, rank in zip(p.placements, p.device_mesh.shape, p.device_mesh.get_coordinate(), strict=True):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            raise ValueError(f"box_of: got placements {p.placements}, wanted Shard and Replicate alone")
        dim, each = placement.dim, -(-size[placement.dim] // ranks)
        first = min(rank * each, size[dim])
        start[dim] += first
        size[dim] = min(each, size[dim] - first)
    return start, size


def own(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The box of a whole tensor that this rank holds of `like`: all of it, if that is no DTensor."""
    if isinstance(like, DTensor):
        for dim, (first, n) in enumerate(zip(*box_of(like), strict=True)):
            whole = whole.narrow(dim, first, n)
    return whole


def normal_box_(p, std, seed, place):
    if not isinstance(p, DTensor):      # the one rank of a stage
        return normal_(p, std, seed, place)
    local = p.to_local()
    start, size = box_of(p)
    local.copy_(box_normal(p.shape, start, size, seed=seed, site=place, std=std, dtype=p.dtype, device=local.device))
