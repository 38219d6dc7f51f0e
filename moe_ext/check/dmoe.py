"""Our MoE layer beside a loop over its experts in plain torch, each spread over the ranks in its own way, through one
training step: outputs, gradients, updated parameters and outputs again must agree.

    EP=2 SHARD=1    experts on the ranks that own them, the router replicated      beside DistributedDataParallel
    SHARD=2         FSDP2                                                          beside FSDP2
    EP=2 SHARD=2    FSDP2 around experts on the ranks that own them                beside FSDP2

EP ranks are borrowed from the SHARD ranks. The last mode ends elsewhere in "aten._foreach_add_.List: DTensor does not
support cross-mesh operation yet": router and experts live on different meshes, and one optimizer steps both.

    y = sum over the K chosen experts of p_k / sum(p) * (gelu(x w1^T) * (x v1^T)) w2       p = softmax(x router^T)

Both add up y over all ranks and divide by the ranks, as DDP does: an expert's gradient is a sum over the tokens of all
ranks already, so nothing else is scaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_ext.check.world import DTYPES, OnMesh, World, describe
from moe_ext.config import MeshConfig, require
from moe_ext.layers.fused import FusedMoE
from moe_ext.parallel.collectives import gather_rows
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import parallelize, shard
from moe_ext.parallel.transport import TorchTransport

TOLERANCES = {"bf16": 1.6e-2, "fp32": 1e-5, "fp64": 1e-12}  # of a tensor's largest value
LEARNING_RATE = 0.1


class TorchMoE(nn.Module):
    """The layer in plain torch: router [E,D], w1, v1, w2 [E,F,D]; x_BSD -> y_BSD."""

    def __init__(self, weights: dict[str, torch.Tensor], top_k: int):
        super().__init__()
        self.top_k = top_k
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        real = torch.promote_types(x_TD.dtype, torch.float32)
        p_TE = (x_TD.to(real) @ self.router.to(real).T).softmax(-1)
        p_TK, ids_TK = p_TE.topk(self.top_k)
        if self.top_k > 1:
            p_TK = p_TK / p_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for e in range(len(self.w1)):
            t, k = (ids_TK == e).nonzero(as_tuple=True)
            h = F.gelu(x_TD[t] @ self.w1[e].T) * (x_TD[t] @ self.v1[e].T)
            y_TD = y_TD.index_add(0, t, p_TK[t, k, None].to(h.dtype) * (h @ self.w2[e]))
        return y_TD.view_as(x_BSD)


@dataclass(frozen=True)
class Dmoe(OnMesh):
    """Our MoE layer beside a loop over experts in torch, through one training step on any mesh."""

    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"  # of parameters and activations; fp64 runs on the CPU
    dim: int = 256  # model width D
    hidden: int = 256  # width F of an expert
    experts: int = 8
    top_k: int = 2  # experts per token

    def run(self, world: World) -> bool:
        require(self.tp == 1, f"TP is {self.tp}, but this check spreads experts, not matrices: set TP to 1")
        with world.joined():
            weights, x_BSD = self.draw(world)
            if self.shard == 1 and self.ep > 1:
                torch_side, our_side = self.by_hand(world, weights)
            else:
                torch_side, our_side = self.on_mesh(world, weights)
            world.say(f"""
    torch_dmoe: {torch_side.module}
    dmoe: {our_side.module}
""")
            theirs, ours = (train_one_step(side, x_BSD) for side in (torch_side, our_side))
            world.say_each(f"""    rank: {world.rank}
    x.size(): {x_BSD.size()}
    x.device: {x_BSD.device}
    torch_y.size(): {theirs["output"].size()}
    y.size(): {ours["output"].size()}
""")
            return all([close(world, name, ours[name], want, TOLERANCES[self.dtype]) for name, want in theirs.items()])

    def draw(self, world: World) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The weights, the same on every rank, and this rank's tokens [2,3,D]."""
        generator = torch.Generator().manual_seed(1234)
        options = dict(generator=generator, dtype=torch.float64)

        def uniform(*shape):
            return torch.rand(*shape, **options) * 2 - 1

        E, F, D = self.experts, self.hidden, self.dim
        weights = {"router": uniform(E, D), "w1": uniform(E, F, D), "v1": uniform(E, F, D),
                   "w2": 0.02 * torch.randn(E, F, D, **options)}
        x_WBSD = torch.randn(world.size, 2, 3, D, **options)
        to = dict(device=world.device, dtype=DTYPES[self.dtype])
        return {name: value.to(**to) for name, value in weights.items()}, x_WBSD[world.rank].to(**to)

    def layer(self, weights: dict[str, torch.Tensor]) -> FusedMoE:
        """moe_ext's layer with these values."""
        layer = FusedMoE(self.dim, self.hidden, self.experts, self.top_k, act="geglu", score="softmax_topk",
                         dtype=DTYPES[self.dtype], device=weights["w1"].device)
        layer.load_state_dict({"gate.weight": weights["router"], "experts.w2_EDF": weights["w2"].transpose(1, 2),
                               "experts.w13_E2FD": torch.stack([weights["w1"], weights["v1"]], 1)})
        return layer

    def by_hand(self, world: World, weights: dict[str, torch.Tensor]) -> tuple[Side, Side]:
        """DDP, and all that expert parallelism takes: this rank's experts, the exchange, and the sum over those ranks
        that hold the same parameter."""
        require(self.dp * self.ep == world.size, f"DP {self.dp} * EP {self.ep} = {self.dp * self.ep}, but there are "
                f"{world.size} ranks: change --nproc-per-node or the sizes")
        mesh = init_device_mesh(world.device.type, (self.dp, self.ep), mesh_dim_names=("dp", "ep"))
        world.say(f"""
    torch_dmoe_mesh: None
    dmoe_mesh: {describe(mesh)}
    DP_mesh: {describe(mesh["dp"])}
    EP_mesh: {describe(mesh["ep"])}""")
        ep = mesh.get_group("ep")
        layer, rank = self.layer(weights), dist.get_rank(ep)
        for name, p in layer.experts.named_parameters():
            setattr(layer.experts, name, nn.Parameter(p.detach().chunk(self.ep)[rank].clone()))
        layer.exchange = ExpertExchange(self.experts, TorchTransport(ep))

        def sum_gradients():
            for name, p in layer.named_parameters():
                dist.all_reduce(p.grad, group=mesh.get_group("dp") if name.startswith("experts.") else None)

        def whole(name, tensor):
            return gather_rows(tensor, 0, ep) if name.startswith("experts.") else tensor

        ddp = DistributedDataParallel(TorchMoE(weights, self.top_k))
        return Side(ddp, 1.0), Side(layer, 1 / world.size, sum_gradients, whole)

    def on_mesh(self, world: World, weights: dict[str, torch.Tensor]) -> tuple[Side, Side]:
        """FSDP2 around both; ours with expert parallelism too if EP > 1."""
        dp, fsdp, tp, ep = self.sizes(world.size)
        mesh = Mesh(MeshConfig(rep=dp, fsdp=fsdp, tp=tp, ep=ep), world.device)
        theirs, ours = TorchMoE(weights, self.top_k), self.layer(weights)
        parallelize(ours, mesh)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")   # nobody writes into it
        if world.size > 1:
            shard(theirs, mesh.dense, "fsdp", lambda name: 0)
            world.say(f"""
    torch_dmoe_mesh: {describe(mesh.dense["rep", "fsdp"])}
    dmoe_mesh: {describe(mesh.sparse)}
    DP_mesh: {describe(mesh.sparse["rep", "efsdp"])}
    EP_mesh: {describe(mesh.sparse["ep"])}""")
        return Side(theirs, 1 / world.size), Side(ours, 1 / world.size)


class Side(NamedTuple):
    """One of the two layers, and what is peculiar to how it is spread."""

    module: nn.Module
    share: float  # of y's sum in the loss: gradients are summed over ranks, where they are not averaged
    finish: Callable[[], None] = lambda: None  # after the backward
    whole: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: (
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    )  # a parameter or gradient, put together


def train_one_step(side: Side, x_BSD) -> dict[str, torch.Tensor]:
    """-> outputs before and after a step of SGD, gradients and updated parameters, by TorchMoE's names."""

    def output():
        y = side.module(x_BSD)
        return y[0] if isinstance(y, tuple) else y

    def parts(of, suffix):
        return {f"{name}{suffix}": value for name, value in by_torch_name({
            name.removeprefix("module."): side.whole(name, of(p).detach()) for name, p in side.module.named_parameters()
        }).items()}

    optimizer = torch.optim.SGD(side.module.parameters(), lr=LEARNING_RATE, foreach=True)
    y_BSD = output()
    (side.share * y_BSD.sum()).backward()
    side.finish()
    told = {"output": y_BSD.detach()} | parts(lambda p: p.grad, ".grad")
    optimizer.step()
    return told | parts(lambda p: p, " after the step") | {"output after the step": output().detach()}


def by_torch_name(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "router" in ours:
        return ours
    w13 = ours["experts.w13_E2FD"]
    return {"router": ours["gate.weight"], "w1": w13[:, 0], "v1": w13[:, 1],
            "w2": ours["experts.w2_EDF"].transpose(1, 2)}


def close(world: World, name: str, got, want, tolerance: float) -> bool:
    """Says how far apart the two are, as a share of the largest value, on the rank where it is worst."""
    scale = want.double().abs().max()
    error = max(map(float, world.gather(str(float((got.double() - want.double()).abs().max() / scale)))))
    world.say(f"    {name:21}  differs by {error:.1e} of its maximum: {'ok' if error <= tolerance else 'WRONG'}")
    return error <= tolerance
