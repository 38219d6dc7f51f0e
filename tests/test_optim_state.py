"""State between steps, as it is, rounded or on the host; AdamW; several optimizers as one."""
import copy
import pickle
import weakref

import pytest
import torch
import torch._dynamo  # fully_shard imports it, which takes seconds: once here, not in every rank
from ranks import run_ranks
from test_checkpoint_mesh import optimizer_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moe_ext.optim import Muon, Shampoo, adamw
from moe_ext.optim.adamw import AdamW
from moe_ext.optim.state import Kept
from moe_ext.optim.together import Together
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import build
from moe_ext.proof import own

BETAS = 0.9, 0.95


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (33, 17), (5,), (), (64, 8, 3), (0, 3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes] + \
        [nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype).t())]


def train(make, dtype=torch.float32, steps=5):
    """Parameters and optimizer after some steps, whose gradients are a function of the step's number."""
    params = parameters(dtype)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.0}])
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = gradient if i or step else None        # no state before the second step
        optimizer.step()
    return params, optimizer


def states(params, optimizer):
    return [{key: t.clone() for key, t in optimizer.state[p].items()} for p in params]


def equal(one, other):
    (ps, a), (qs, b) = one, other
    return all(map(torch.equal, ps, qs)) and all(
        x.keys() == y.keys() and all(x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]) for key in x)
        for x, y in zip(states(ps, a), states(qs, b), strict=True))


def ours(state):
    return lambda groups: AdamW(groups, 0.01, BETAS, state=state)


# ---- AdamW -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_full_and_host_are_torchs_fused_step(monkeypatch, dtype):
    """Parameters, state dict and all, bit for bit, whatever fits into a bucket."""
    theirs = train(lambda groups: torch.optim.AdamW(groups, 0.01, BETAS, fused=True), dtype)
    for state, bucket in (("full", 2**26), ("host", 2**26), ("host", 2048)):
        monkeypatch.setattr(adamw, "BUCKET", bucket)
        mine = train(ours(state), dtype)
        assert equal(mine, theirs), (state, bucket)
        assert mine[1].state_dict()["param_groups"] == theirs[1].state_dict()["param_groups"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bf16_is_the_same_step_rounded(monkeypatch, dtype):
    """Each step is torch's from the moments as they are kept, and these are rounded to nearest after it."""
    params, optimizer = train(ours("bf16"), dtype, steps=4)
    theirs = parameters(dtype)
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.02, "weight_decay": 0.0}]
    exact = torch.optim.AdamW(groups, 0.01, BETAS, fused=True)
    for p, q in zip(params, theirs, strict=True):
        q.data.copy_(p)
        exact.state[q] = {key: t.to(torch.float32 if key == "step" else dtype, copy=True)
                          for key, t in optimizer.state[p].items()}
        p.grad = torch.full_like(p, 0.3)
        q.grad = p.grad.clone()
    monkeypatch.setattr(adamw, "BUCKET", 2048)
    optimizer.step()
    exact.step()
    assert all(map(torch.equal, params, theirs))
    for p, q in zip(params, theirs, strict=True):
        for key in adamw.MOMENTS:
            kept = optimizer.state[p][key]
            assert kept.dtype == torch.bfloat16 and torch.equal(kept, exact.state[q][key].to(torch.bfloat16))


class Far(Kept):
    """Keeps elsewhere: counts what is fetched, and the most of it that is alive at a time."""
    peak = trips = 0

    def __init__(self):
        super().__init__("host")
        self.fetched = []

    def get(self, stored, like):
        value = super().get(stored, like).clone()
        self.fetched = [ref for ref in (*self.fetched, weakref.ref(value)) if ref() is not None]
        self.peak = max(self.peak, sum(ref().nbytes for ref in self.fetched))
        self.trips += 1
        return value


def test_state_comes_bucket_by_bucket(monkeypatch):
    """No more than a bucket is fetched at a time, also of a parameter that is larger, and all goes back."""
    monkeypatch.setattr(adamw, "BUCKET", 2048)
    far = Far()

    def make(groups):
        optimizer = AdamW(groups, 0.01, BETAS, state="host")
        optimizer.keep = far
        return optimizer
    shapes = [p for p in parameters() if p.is_contiguous()]         # others come whole
    monkeypatch.setitem(globals(), "parameters", lambda dtype=torch.float32: [nn.Parameter(p.detach()) for p in shapes])
    mine = train(make)
    assert 1024 < far.peak <= 2048 and far.trips > 100
    assert equal(mine, train(lambda groups: torch.optim.AdamW(groups, 0.01, BETAS, fused=True)))


def test_host_state_lies_in_the_hosts_memory():
    p = torch.empty(3, 4, device="meta")
    kept = Kept("host").zeros(p)
    assert kept.device.type == "cpu" and kept.dtype == p.dtype and Kept("host").get(kept, p).device.type == "meta"
    assert Kept("full").zeros(p, (7,)).device.type == "meta" and Kept("bf16").zeros(p, (7,)).shape == (7,)


def test_bad_settings():
    """Also why: a mean of squares in bf16 does not come down with beta2 .999, whatever the gradients are."""
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match='state: got \'fp8\', wanted "full", "bf16" or "host"'):
        AdamW([p], state="fp8")
    with pytest.raises(ValueError, match=r"beta2: got 0.999, wanted at most 0.99 with state \"bf16\".*\"host\" or"):
        AdamW([p], state="bf16")
    with pytest.raises(ValueError, match=r"momentum: got 0.995, wanted at most 0.99 with state \"bf16\""):
        Muon([nn.Parameter(torch.ones(3, 3))], momentum=0.995, state="bf16")
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW([{"params": [p], "amsgrad": True}])
    kept = Kept("bf16").zeros(p)
    for decay, stands in ((0.999, True), (0.99, False)):
        kept.fill_(1.0)
        for _ in range(100):
            Kept("bf16").put(Kept("bf16").get(kept, p) * decay, kept)
        assert bool((kept == 1).all()) == stands


# ---- state dicts, copies, several as one -----------------------------------------------------------------------------
def two(state):
    return lambda groups: Together([AdamW(groups[:1], 0.01, BETAS, state=state),
                                    AdamW(groups[1:], 0.01, BETAS, state=state)])


@pytest.mark.parametrize("make", [ours, two])
@pytest.mark.parametrize("state, other", [("full", "bf16"), ("bf16", "full"), ("bf16", "bf16"), ("host", "full")])
def test_a_state_dict_is_kept_as_the_optimizer_keeps_it(make, state, other):
    (saved, source), (params, optimizer) = train(make(other)), train(make(state), steps=1)
    optimizer.load_state_dict(source.state_dict())
    want = torch.bfloat16 if state == "bf16" else torch.float32
    for mine, theirs in zip(states(params, optimizer), states(saved, source), strict=True):
        assert all(torch.equal(mine[key], theirs[key].to(torch.float32 if key == "step" else want)) for key in theirs)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not any(p.numel() and torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_state_dict_of_another_optimizer_or_shape_is_refused():
    params, optimizer = train(two("full"))
    before = states(params, optimizer)
    momentum = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], momentum=0.9)
    momentum.step()
    with pytest.raises(ValueError, match="AdamW: got a state whose groups lack betas, eps, as another optimizer's do"):
        optimizer.load_state_dict(momentum.state_dict())
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][3]["momentum_buffer"] = torch.zeros(64, 8, 3)
    with pytest.raises(ValueError, match=r"momentum_buffer \[64, 8, 3\], wanted the state of AdamW: .*exp_avg"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][3]["step"] = 1
    with pytest.raises(ValueError, match=r"parameter 3 .*got a state step that is 1, wanted a tensor"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][3]["exp_avg"] = torch.zeros(64, 3, 8)
    with pytest.raises(ValueError, match=r"exp_avg \[64, 3, 8\], wanted .*\[64, 8, 3\]"):
        optimizer.load_state_dict(wrong)
    assert all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
               for a, b in zip(before, states(params, optimizer), strict=True))


def matrix(make):
    p = nn.Parameter(torch.arange(12.0).view(4, 3).sin())
    return p, make([p])


MAKE = {"adamw": lambda params, **how: AdamW(params, 0.1, BETAS, **how),
        "muon": lambda params, **how: Muon(params, 0.1, **{"ns_dtype": torch.float64} | how),
        "shampoo": lambda params, **how: Shampoo(params, 0.1, BETAS, precondition_frequency=1, epsilon=1e-3, **how),
        "together": lambda params, **how: Together([Muon(params, 0.1, **how)])}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adafactor, Shampoo, Muon])
def test_groups_of_another_optimizer_are_refused(make, other):
    """Before the first step, when there is no state to tell them by."""
    p, optimizer = matrix(make)
    if other in map(type, (optimizer, *getattr(optimizer, "parts", ()))):
        return
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"got a state whose groups lack .*, as another optimizer's do"):
        optimizer.load_state_dict(other([p]).state_dict())
    assert optimizer.state_dict() == before
    optimizer.load_state_dict(matrix(make)[1].state_dict())


@pytest.mark.parametrize("name", ["adamw", "shampoo"])
def test_a_mean_that_would_stand_still_is_refused_with_a_state_too(name):
    _, optimizer = matrix(lambda params: MAKE[name](params, state="bf16"))
    state = optimizer.state_dict()
    state["param_groups"][0]["betas"] = 0.9, 0.999
    with pytest.raises(ValueError, match=r"beta2: got 0.999, wanted at most 0.99"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == BETAS


@pytest.mark.parametrize("name, bad", [("adamw", dict(amsgrad=True)), ("muon", dict(momentum=2.0)),
                                       ("shampoo", dict(epsilon=-1.0))])
def test_groups_that_are_bad_or_empty(name, bad):
    _, optimizer = matrix(MAKE[name])
    with pytest.raises(ValueError, match=next(iter(bad))):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **bad})
    assert len(optimizer.param_groups) == 1
    p = nn.Parameter(torch.ones(2, 2))
    later = MAKE[name]([{"params": []}])
    later.step()
    later.add_param_group({"params": [p]})
    p.grad = torch.eye(2)
    later.step()
    assert not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("make", [ours, two])
def test_copies(make):
    """Of parameters and optimizer, they step as the original does, kept in the same way."""
    original = train(make("bf16"))
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        for params, optimizer in (copied, copy.deepcopy(original)):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
        again = copy.deepcopy(original)
        for p in again[0]:
            p.grad = torch.full_like(p, 0.5)
        again[1].step()
        assert equal(copied, again)


def test_several_as_one():
    """The steps of the parts; groups and state are the same objects; hooks run once; errors."""
    params, optimizer = train(two("full"))
    assert equal((params, optimizer), train(ours("full")))
    assert [part.state is optimizer.state for part in optimizer.parts] == [True, True]
    optimizer.param_groups[1]["lr"] = 0.5
    assert optimizer.parts[1].param_groups[0]["lr"] == 0.5 and optimizer.fallbacks == 0
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer.step(lambda: 7.0) == 7 and calls == ["before", "after"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params) and repr(optimizer).startswith("Together(AdamW (")
    with pytest.raises(ValueError, match="give it to one of them before"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together([AdamW(params), AdamW(params[:1])])


def test_a_step_runs_hooks_once_beside_torchs_own():
    torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    _, optimizer = train(ours("full"))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


# ---- on meshes -------------------------------------------------------------------------------------------------------
MODEL = ModelConfig(vocab_size=50, seq_len=16, layers=2, dim=16, heads=2, hidden=32,
                    moe=MoEConfig(experts=4, top_k=2, hidden=24))


def trained(mesh, state):
    """Losses of ten steps in fp64, of Muon, Shampoo and AdamW together, and this rank's parameters after them."""
    config = Config(model=MODEL, mesh=mesh, train=TrainConfig(dtype="fp64", seed=3, micro_batch=8 // mesh.dp))
    mesh = Mesh(config.mesh)
    model = build(config, mesh)
    optimizer, losses = optimizer_of(model, "muon shampoo", state), []
    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=config.train.micro_batch, micros=1)
    text = torch.randint(50, (10, 8, 17), generator=torch.Generator().manual_seed(0))
    for ids in text:
        def feed(micro, ids=ids):
            first, last = mesh.rows(micro, config.train.micro_batch)
            return ids[first:last, :-1], ids[first:last, 1:]
        sums = pipeline.step(feed, 1, tokens=128)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(pipeline.sum(*sums)[0]))
    return losses, dict(model.named_parameters())


def test_gradients_that_are_partial_or_missing_on_a_rank():
    """torch's SequenceParallel leaves norms with gradients that are summed by who reads them. What one rank alone lacks
    is an error, before any state has moved."""
    grads = torch.randn(2, 3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def steps(make, rank=None):
        p = torch.arange(12.0, dtype=torch.float64).view(4, 3).sin()
        if rank is not None:
            mesh = init_device_mesh("cpu", (2,))
            p = DTensor.from_local(p, mesh, [Replicate()], run_check=False)
        p = nn.Parameter(p)
        optimizer = make([p])
        for step in range(3):
            if rank is None:
                p.grad = grads[:, step].sum(0)
            else:
                p.grad = DTensor.from_local(grads[rank, step], mesh, [Partial()], run_check=False)
            if rank == 1 and step == 1:
                whole, p.grad = p.grad, None
            if rank is not None and step == 1 and make is not MAKE["adamw"]:
                before = states([p], optimizer)
                with pytest.raises(ValueError, match="1 of the 2 ranks that share it move it"):
                    optimizer.step()
                assert all(torch.equal(a, b) for a, b in zip(before[0].values(), optimizer.state[p].values(),
                                                             strict=True))
            if rank == 1 and step == 1:
                p.grad = whole
            optimizer.step()
        if rank is not None and make is not MAKE["shampoo"]:
            with pytest.raises(ValueError, match=r"parameter 0 .* is a DTensor, wanted a Tensor as the parameter is"):
                make([nn.Parameter(p.to_local().detach())]).load_state_dict(optimizer.state_dict())
        return (p if rank is None else p.to_local()).detach()

    makers = [MAKE[name] for name in ("adamw", "muon", "shampoo")]
    for found in run_ranks(2, lambda rank: [steps(make, rank) for make in makers]):
        for got, make in zip(found, makers, strict=True):
            torch.testing.assert_close(got, steps(make), rtol=1e-13, atol=1e-13)


def test_state_that_is_not_full_is_the_same_on_any_mesh(tmp_path):
    """One process with the same state to 1e-11 after ten steps; "host" is "full" bit for bit, and bf16 near it."""
    one, = run_ranks(1, lambda rank: {state: trained(MeshConfig(), state) for state in ("full", "host", "bf16")})
    assert one["full"][0] == one["host"][0]
    assert all(torch.equal(p, one["full"][1][name]) for name, p in one["host"][1].items())
    apart = abs(one["bf16"][0][-1] - one["full"][0][-1]) / one["full"][0][-1]
    assert 1e-9 < apart < 1e-3, apart

    def body(rank, mesh):
        for state in ("bf16", "host")[:mesh.fsdp]:
            losses, params = trained(mesh, state)
            assert losses == pytest.approx(one[state][0], rel=1e-11)
            for name, p in params.items():
                whole = one[state][1][name]
                part = p.to_local() if isinstance(p, DTensor) else p
                assert part.numel() == 0 or float((part - own(whole, p)).abs().max() / whole.abs().max()) < 1e-11, name
    run_ranks(2, lambda rank: body(rank, MeshConfig(fsdp=2, ep=2)))
    run_ranks(4, lambda rank: body(rank, MeshConfig(rep=2, tp=2)))
