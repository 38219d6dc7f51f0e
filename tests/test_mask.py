"""token_mask: what real tokens get behind, before and among pads is what they get alone: in the layer, in the GPT, in a
cache and on a mesh, in the widest dtype of the device."""
import math

import pytest
import torch
from devices import widest
from ranks import run_ranks
from test_model import VARIANTS, make, text

from moe_ext import FusedMoE, proof
from moe_ext.config import MeshConfig
from moe_ext.model import KVCache
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import backward

D, F, E, S = 8, 6, 4, 16
LARGE = 1e30        # what stands in a pad: its square is infinite in fp32


def close(got, want, what="", tolerance=None):
    scale = want.abs().max().item() + 1e-3 if want.numel() else 1
    tolerance = tolerance or (1e-12 if want.dtype == torch.float64 else 1e-5)
    assert got.shape == want.shape and (got - want).abs().le(tolerance * scale).all(), what


def padded(x_BSn, total, where, fill):
    """-> x of `total` tokens per sequence, and their mask: its real tokens, in order, stand where `where` says."""
    B, S = x_BSn.shape[:2]
    mask_BS = torch.zeros(B, total, dtype=torch.bool)
    for b in range(B):
        place = {"left": range(total - S, total), "right": range(S),
                 "among": sorted(torch.randperm(total, generator=torch.Generator().manual_seed(b))[:S].tolist())}
        mask_BS[b, list(place[where])] = True
    mask_BS = mask_BS.to(x_BSn.device)
    y = x_BSn.new_full((B, total, *x_BSn.shape[2:]), fill)
    y[mask_BS] = x_BSn.flatten(0, 1)
    return y, mask_BS


# ---- the layer -------------------------------------------------------------------------------------------------------

LAYERS = {
    "dropless": dict(bias=True, balance_weight=0.5),
    "issue": dict(capacity_factor=1.0, balance_weight=1.0),
    "by probability": dict(capacity_factor=0.8, drop_by="probability", z_weight=0.3, balance_weight=0.1),
    "micro-batch": dict(scope="micro_batch", capacity_factor=0.7, z_weight=0.3, balance_weight=0.1),
    "sigmoid": dict(score="sigmoid", select_bias=True, balance_weight=0.5, balance_form="mse"),
    "top 1": dict(top_k=1, z_weight=0.5, shared_hidden=5),
}


def layer_of(name, device):
    torch.manual_seed(4)
    layer = FusedMoE(D, F, E, **{"top_k": 2, **LAYERS[name]}, dtype=widest(device), device=device)
    torch.nn.init.normal_(layer.gate.weight)
    return layer


def run(layer, x, mask=None):
    """-> y, x's gradient, those of the parameters, Routing."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, routing = layer(x, token_mask=mask)
    kept = y if mask is None else y[mask]
    (kept.flatten(0, -2) * torch.arange(kept.numel(), device=x.device).view(-1, D).sin()).sum().backward(
        retain_graph=True)
    if routing.loss.requires_grad:
        routing.loss.backward()
    return y, x.grad, {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}, routing


@pytest.mark.parametrize("where", ["left", "right", "among"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_pads_change_nothing(name, training, where, device):
    layer = layer_of(name, device).train(training)
    x = torch.randn(3, S, D, dtype=widest(device), device=device)
    pads = 1.0 if layer.shared is not None else LARGE
    many, mask = padded(x, S + 96, where, pads)
    want_y, want_dx, want_grads, want = run(layer, x)
    y, dx, grads, routing = run(layer, many, mask)
    close(y[mask].view_as(want_y), want_y, "y")
    close(dx[mask].view_as(want_dx), want_dx, "dx")
    assert dx[~mask].eq(0).all() and (layer.shared is not None or y[~mask].eq(0).all())
    for p, grad in want_grads.items():
        close(grads[p], grad, p)
    close(routing.loss, want.loss, "loss")
    assert torch.equal(routing.counts_E, want.counts_E) and routing.dropped == want.dropped
    assert (want.dropped > 0) == bool(training and layer.capacity_factor), "the test should drop something"
    without = run(layer, many.clamp(max=1), None)[3]
    assert not torch.equal(without.counts_E, want.counts_E)


@pytest.mark.parametrize("name", ["issue", "top 1"])
def test_nan_in_a_pad_reaches_no_gradient(name, device):
    layer = layer_of(name, device)
    many, mask = padded(torch.randn(3, S, D, dtype=widest(device), device=device), S + 4, "left", math.nan)
    y, dx, grads, routing = run(layer, many, mask)
    assert y.isfinite().all() and dx.isfinite().all() and routing.loss.isfinite() and routing.bad == 0
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_several_lengths(name, device):
    """Scope by scope: the mean over those that have a token. A sequence of pads alone is as if it were not there."""
    layer = layer_of(name, device)
    x = torch.randn(4, S, D, dtype=widest(device), device=device)
    lengths = [5, 16, 0, 9]
    mask = torch.arange(S, device=device) < torch.tensor(lengths, device=device)[:, None]
    got = run(layer, x, mask)
    if layer.scope == "sequence":
        alone = [run(layer, x[b:b + 1, :n]) for b, n in enumerate(lengths) if n]
        close(got[3].loss, torch.stack([a[3].loss for a in alone]).mean(), "loss")
        assert got[3].dropped == sum(a[3].dropped for a in alone)
        assert torch.equal(got[3].counts_E, sum(a[3].counts_E for a in alone))
        close(got[0][mask], torch.cat([a[0][0] for a in alone]), "y")
    else:
        alone = run(layer, x[mask])
        close(got[3].loss, alone[3].loss, "loss")
        close(got[0][mask], alone[0], "y")
        assert got[3].dropped == alone[3].dropped > 0
    *_, routing = run(layer, x[[0, 1, 3]], mask[[0, 1, 3]])
    close(routing.loss, got[3].loss, "loss without the row of pads")
    y, _, grads, nothing = run(layer, x, torch.zeros_like(mask))
    assert nothing.loss == 0 and nothing.counts_E.eq(0).all() and nothing.dropped == 0
    assert layer.shared is not None or y.eq(0).all()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_mask_of_real_tokens_is_no_mask(device):
    for name in LAYERS:
        layer = layer_of(name, device)
        x = torch.randn(2, S, D, dtype=widest(device), device=device)
        got, want = run(layer, x, torch.ones(2, S, dtype=torch.bool, device=device)), run(layer, x)
        close(got[0], want[0], "y")
        close(got[3].loss, want[3].loss, "loss")


def test_masks_that_do_not_fit():
    layer, x = FusedMoE(D, F, E, 2), torch.randn(2, 3, D)
    for mask in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"FusedMoE: token_mask is .* wanted torch.bool \[2, 3\] on cpu, True for"):
            layer(x, token_mask=mask)
    assert layer(x[0], token_mask=torch.ones(3, dtype=torch.bool))[0].shape == (3, D)
    with pytest.raises(ValueError, match="balanced deals experts out by place"):
        FusedMoE(D, F, E, 2, balanced=True)(x, token_mask=torch.ones(2, 3, dtype=torch.bool))
    model, tokens = make(VARIANTS["dense"], torch.float32), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"GPT: token_mask is torch.int64 \[2, 3\] .*Hint: attention_mask.bool()"):
        model.logits(tokens, token_mask=torch.ones_like(tokens))


# ---- the GPT ---------------------------------------------------------------------------------------------------------

GPTS = [name for name, config in VARIANTS.items()       # no random numbers, no forced balance
        if not (config.moe.noise or config.moe.jitter or config.dropout or config.moe.balanced)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", ["left", "right", "among"])
@pytest.mark.parametrize("name", GPTS)
def test_a_gpt_does_not_see_pads(name, where, recompute, device):
    config = VARIANTS[name]
    model = make(config, widest(device), device=device)
    tokens, targets = (t[:, :7] for t in text(config, device=device))
    many, mask = padded(tokens, config.seq_len, where, 5)
    many_targets, _ = padded(targets, config.seq_len, where, 9)

    def all_of(*args, **options):
        model.zero_grad()
        out = model(*args, **options)
        (out.token_loss + out.aux_loss).backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters()}

    want, want_grads = all_of(tokens, targets)
    model.recompute = recompute
    got, grads = all_of(many, many_targets, token_mask=mask)
    close(got.token_loss, want.token_loss, "token loss")
    close(got.aux_loss, want.aux_loss, "aux loss")
    assert torch.equal(got.counts_LE, want.counts_LE) and torch.equal(got.dropped_L, want.dropped_L)
    assert (want.dropped_L.sum() > 0) == (config.moe.capacity_factor > 0)
    for n in want_grads:
        close(grads[n], want_grads[n], n, 1e-11 if widest(device) == torch.float64 else 1e-4)
    model.eval()
    close(model.logits(many, token_mask=mask)[mask], model.logits(tokens).flatten(0, 1), "logits")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe"])
def test_a_cache_remembers_its_pads(name, device):
    """A batch of prompts of 2, 5 and 4 tokens, padded to the left, continued one token at a time."""
    config = VARIANTS[name]
    model = make(config, widest(device), device=device).eval()
    tokens, lengths, new = text(config, device=device)[0], [2, 5, 4], 3
    prompt = torch.full((3, 5), 7, device=device)
    for b, n in enumerate(lengths):
        prompt[b, 5 - n:] = tokens[b, :n]
    mask = torch.arange(5, device=device) >= 5 - torch.tensor(lengths, device=device)[:, None]
    cache, got = KVCache(config), []
    with torch.no_grad():
        got.append(model.logits(prompt, cache, mask)[:, -1])
        for i in range(new):
            step = torch.stack([tokens[b, n + i] for b, n in enumerate(lengths)])[:, None]
            got.append(model.logits(step, cache)[:, -1])
        for b, n in enumerate(lengths):
            want = model.logits(tokens[b:b + 1, :n + new])[0, n - 1:]
            close(torch.stack(got)[:, b], want, f"sequence {b}")


# ---- a mesh ----------------------------------------------------------------------------------------------------------

@pytest.mark.c_core
@pytest.mark.parametrize("sizes, options", [
    (dict(tp=2, ep=2), dict(position="learned", scope="sequence", drop_by="position", z_weight=1e-2)),
    (dict(fsdp=2, ep=2), dict(scope="micro_batch", drop_by="probability", z_weight=1e-2, bias=True)),
    (dict(tp=2, etp=2), dict(score="sigmoid", scope="micro_batch", balance_form="mse", z_weight=1e-2, recompute=True)),
    (dict(sp=2, tp=2), dict(position="learned", scope="sequence", drop_by="position", z_weight=1e-2)),
    (dict(sp=2, ep=2, attention="gather"), dict(scope="micro_batch", recompute=True)),
], ids=str)
def test_a_mesh_masks_as_one_process(sizes, options, tmp_path):
    case = proof.Case(MeshConfig(**sizes), start="values", **options)
    tokens, targets = (t[0] for t in proof.text(case))
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0], mask[1, :9] = False, False
    mask[0, -1] = True
    real = int(mask.sum())

    def train(mesh):
        model = proof.build(case, mesh)
        begin, end = mesh.rows(0, len(tokens) // mesh.config.dp)
        out = model(tokens[begin:end], targets[begin:end], token_mask=mask[begin:end])
        parts = backward(model, out, mesh, tokens=real)
        totals = mesh.sum(*parts, out.counts_LE, out.dropped_L)
        return totals, {n: (p.grad, proof.local(p.grad)) for n, p in model.named_parameters()}

    (token, aux, counts, dropped), want = train(Mesh(MeshConfig()))
    assert counts.sum() == 2 * real * case.top_k and (dropped.sum() > 0) == (case.drop_by != "nothing")

    def body(rank):
        totals, grads = train(Mesh(case.mesh))
        for got, wanted in zip(totals, (token, aux, counts, dropped), strict=True):
            close(got, wanted.double(), "totals")
        for name, (whole, mine) in grads.items():
            close(mine, proof.own(want[name][1], whole), name, 1e-11)

    run_ranks(case.mesh.world, body, tmp_path)
