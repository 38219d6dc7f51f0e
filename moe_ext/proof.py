"""Every mesh computes what one process computes: losses, gradients and updated parameters, in fp64."""
from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_ext.config import MeshConfig, ModelConfig, MoEConfig, OptimConfig, meshes
from moe_ext.model import GPT
from moe_ext.optim import adamw
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.shard import initialize, parallelize
from moe_ext.parallel.tensor import sum_replicated

MODEL = ModelConfig(vocab_size=52, seq_len=16, layers=2, dim=16, heads=8, head_dim=2, hidden=32, qk_norm=True,
                    init_std=0.3,
                    moe=MoEConfig(experts=8, top_k=2, hidden=16, balance_weight=0.02, z_weight=1e-3))
DENSE = replace(MODEL, moe=MoEConfig())
OPTIM = OptimConfig(lr=1e-2, min_lr=0, warmup=1, eps=1e-5, clip=0.5)
ROWS, STEPS = 8, 2


@dataclass(frozen=True)
class Case:
    mesh: MeshConfig
    model: ModelConfig = MODEL
    accumulation: int = 1
    recompute: bool = False
    dtype: torch.dtype = torch.float64


def clip_grad_norm(named, max_norm):
    import math

    import torch.distributed as dist
    grads, total = [], torch.zeros((), dtype=torch.float64)
    for n, p in named:
        g = p.grad
        c = 1
        if isinstance(g, DTensor):
            c = dist.get_world_size()
            for size, pl in zip(g.device_mesh.shape, g.placements):
                c //= size if pl.is_shard() else 1
            g = g.to_local()
        grads.append(g)
        total += g.double().square().sum() / c
    if dist.is_initialized():
        dist.all_reduce(total)
    total = math.sqrt(total)
    if total > max_norm:
        torch._foreach_mul_(grads, max_norm / total)
    return total


def run(case, mesh=None):
    c, m = case.model, case.mesh if mesh else MeshConfig()
    micro = ROWS // (case.accumulation * m.dp)
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(c.vocab_size, (STEPS, ROWS, c.seq_len + 1), generator=generator)
    if mesh:
        model = GPT(c, dtype=case.dtype, device="meta")
        parallelize(model, mesh)
        initialize(model, 7, "cpu")
    else:
        model = GPT(c, seed=7, dtype=case.dtype)
        mesh = Mesh(m)
    model.recompute = case.recompute
    optimizer = adamw(model, OPTIM)
    record = {}
    for step in range(STEPS):
        loss = aux = counts = 0
        for k in range(case.accumulation):
            begin, end = mesh.rows(k, micro)
            rows = text[step, begin:end]
            draws = mesh.draws(7, step, begin, c.seq_len)
            out = model(rows[:, :-1], rows[:, 1:].contiguous(), draws)
            token, a = out.token_loss / (ROWS * c.seq_len), out.aux_loss / (case.accumulation * m.dp * m.tp)
            (token + a).backward()
            loss, aux, counts = loss + token.detach() / m.tp, aux + a.detach(), counts + out.counts_LE.double()
        if mesh.world > 1:
            sum_replicated(model, mesh)
        loss, aux, counts = mesh.sum(loss, aux, counts)
        model.update_select_bias(counts.long())
        record |= {f"{step}.loss": loss, f"{step}.aux": aux, f"{step}.counts": counts}
        norm = clip_grad_norm(model.named_parameters(), OPTIM.clip)
        record[f"{step}.norm"] = torch.tensor(norm)
        record |= {f"{step}.grad.{n}": p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        record |= {f"{step}.param.{n}": p.detach().clone() for n, p in model.named_parameters()}
    return record


def errors(got, want):
    worst = {}
    for name, w in want.items():
        g = got[name]
        scale = float(w.abs().max()) if w.numel() else 0
        if isinstance(g, DTensor):
            shape, start = compute_local_shape_and_global_offset(g.shape, g.device_mesh, g.placements)
            for d, (a, n) in enumerate(zip(start, shape)):
                w = w.narrow(d, min(a, w.shape[d]), n)
            g = g.to_local()
        if w.numel():
            worst[name] = float((g - w).abs().max()) / (scale + 1e-3)
    return worst


def prove(case, folder):
    want = run(case)

    def body(rank):
        mesh = Mesh(case.mesh)
        return errors(run(case, mesh), want)

    worst = {}
    for e in run_ranks(case.mesh.world, body, folder):
        for k, v in e.items():
            worst[k] = max(v, worst.get(k, 0))
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    import torch._dynamo
    for world in map(int, sys.argv[1].split(",")):
        for m in meshes(world):
            for name, model in [("moe", MODEL)] + ([("dense", DENSE)] if m.ep == m.etp == 1 else []):
                with tempfile.TemporaryDirectory() as folder:
                    t = time.time()
                    try:
                        worst = prove(Case(m, model), folder)
                    except AssertionError:
                        print("FAIL", m.sizes, name, flush=True)
                        continue
                    k = max(worst, key=worst.get)
                    print("ok" if worst[k] < 1e-12 else "BAD", m.sizes, name, k, f"{worst[k]:.1e} {time.time()-t:.1f}s",
                          "" if worst[k] < 1e-12 else [(k,f"{v:.0e}") for k,v in worst.items() if v > 1e-12][:8], flush=True)
