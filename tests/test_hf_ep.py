"""Expert parallelism of transformers' models by ep_implementation="moe_ext": gloo ranks equal one process."""

import os
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from ranks import run_ranks  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.distributed.expert_parallel import AllToAllEP  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

import moe_ext.transformers  # noqa: E402
from moe_ext.optim.clip import clip_grad_norm  # noqa: E402
from moe_ext.transformers.ep import Meeting, TokenExchangeEP  # noqa: E402

pytestmark = [
    pytest.mark.c_core,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers puts the ranks of its mesh on the GPUs"),
]

E, K, D, H = 8, 3, 16, 12
SMALL = dict(vocab_size=40, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=H, num_experts_per_tok=K, max_position_embeddings=32, pad_token_id=None)  # fmt: skip
GLM = dict(moe_intermediate_size=H, n_routed_experts=E, n_shared_experts=1, first_k_dense_replace=1, n_group=2,
           topk_group=1)  # fmt: skip
MODELS = {
    "qwen3_moe": dict(head_dim=4, moe_intermediate_size=H, num_experts=E, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "olmoe": dict(num_experts=E),
    "deepseek_v3": dict(GLM, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4,
                        qk_nope_head_dim=4, v_head_dim=4),
    "glm4_moe": dict(GLM, head_dim=4),
    "gpt_oss": dict(head_dim=4, num_local_experts=E, sliding_window=4,
                    layer_types=["sliding_attention", "full_attention"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name): the folder of a small random model of this architecture, in float64."""
    folders = {}

    def save(name):
        if name not in folders:
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | MODELS[name])).double()
            for p in model.parameters():
                nn.init.normal_(p, std=0.3)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
        return folders[name]

    return save


def load(folder, rank=None, implementation="moe_ext", experts="moe_ext", dtype=torch.float64, **mesh):
    """The model of one process with eager experts, or, with a rank, this rank's part of it."""
    config = None
    if rank is not None:
        world = mesh.get("tp_size", 1) * mesh.get("fsdp_size", 1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        config = DistributedConfig(**mesh, ep_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", distributed_config=config,
        experts_implementation="eager" if rank is None else experts)  # fmt: skip
    if dtype != torch.float64:
        return model
    for module in model.modules():
        if isinstance(module, FSDPModule) and getattr(module, "_is_expert_parallel", False):
            # on these meshes of one rank torch 2.13 divides gradients of float64 and float16 by the factor twice
            module.set_gradient_divide_factor(mesh["fsdp_size"] ** 0.5)
    return model.double()  # with the routers that transformers keeps in float32


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(model, batches):
    """-> the logits of each batch, the mean of their losses, whole gradients by name."""
    logits, losses = [], []
    for ids in batches:
        logits.append(whole(model(ids).logits))
        losses.append(F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / len(batches))
        losses[-1].backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in logits], sum(losses).detach(), grads


def equal(got, want, what, tolerance=1e-12):
    assert got.shape == want.shape, what
    assert (got - want).norm() <= tolerance * want.norm(), f"{what}: {(got - want).norm() / want.norm()}"


def same(got, want, tolerance=1e-12):
    """got: what step returned on each rank with a batch of its own."""
    for batch, (logits, _, grads) in enumerate(got):
        equal(logits[0], want[0][batch], "logits", tolerance)
        assert grads.keys() == want[2].keys()
        for name in grads:
            equal(grads[name], want[2][name], name, tolerance)
    equal(sum(loss for _, loss, _ in got) / len(got), want[1], "loss", tolerance)


def batches(*shapes):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(SMALL["vocab_size"], shape, generator=g) for shape in shapes]


UNEVEN = batches((2, 7), (1, 4))


@pytest.mark.parametrize(
    "name, experts", [(name, "moe_ext") for name in MODELS] + [("qwen3_moe", "eager"), ("gpt_oss", "eager")]
)
def test_two_ranks_equal_one(saved, name, experts, tmp_path):
    folder = saved(name)
    want = step(load(folder), UNEVEN)

    def body(rank):
        return step(load(folder, rank, experts=experts, fsdp_size=2, ep_size=2), UNEVEN[rank : rank + 1])

    same(run_ranks(2, body, tmp_path), want)


@pytest.mark.parametrize("implementation", ["moe_ext", "all_reduce", "all_to_all"])
def test_ranks_that_share_a_batch(saved, implementation, tmp_path):
    """Tensor parallelism beside it; our experts under transformers' own implementations too, with their sentinels."""
    folder = saved("qwen3_moe")
    want = step(load(folder), UNEVEN[1:])
    mesh = dict(implementation=implementation, tp_size=2, ep_size=2)
    for got in run_ranks(2, lambda rank: step(load(folder, rank, **mesh), UNEVEN[1:]), tmp_path):
        same([got], want)


# ---- the experts of one layer ----------------------------------------------------------------------------------------


class Layer:
    """Experts, tokens of all ranks and what goes with them."""

    def __init__(self, routing, sizes):
        g, T = torch.Generator().manual_seed(3), sum(sizes)
        self.sizes, E0 = sizes, {"random": E, "rank 0": E // 2, "one": 1}[routing]
        self.ids = torch.rand(T, E, generator=g)[:, :E0].argsort(1)[:, :K]
        made = (torch.randn(*size, generator=g, dtype=torch.float64) for size in [
            (T, D), (T, self.ids.shape[1]), (T, D), (E, 2 * H, D), (E, D, H)])  # fmt: skip
        self.x, self.weights, self.dy, self.up, self.down = made

    def run(self, implementation, here=slice(None), rows=slice(None), kind=None, wanted="xwud"):
        """y and the wanted gradients: of x, weights, up, down."""
        config = AutoConfig.for_model("qwen3_moe", **SMALL | MODELS["qwen3_moe"], experts_implementation=implementation)
        experts = Qwen3MoeExperts(config)
        leaves = [self.x[rows].clone(), self.weights[rows].clone(), self.up[here].clone(), self.down[here].clone()]
        leaves = [t.requires_grad_(letter in wanted) for t, letter in zip(leaves, "xwud", strict=True)]
        experts.gate_up_proj, experts.down_proj = (nn.Parameter(t, t.requires_grad) for t in leaves[2:])
        leaves[2:] = experts.parameters()
        forward = experts
        if kind:
            experts.num_experts, experts._is_expert_parallel = len(self.up[here]), True
            mesh = init_device_mesh("cpu", (len(self.sizes), 1), mesh_dim_names=("ep", "tp"))
            forward = kind(experts, mesh["ep"], mesh["tp"])
        y = forward(leaves[0], self.ids[rows], leaves[1])
        return y.detach(), torch.autograd.grad(y, [t for t in leaves if t.requires_grad], self.dy[rows])

    def on(self, rank, implementation, kind=TokenExchangeEP, **more):
        n = E // len(self.sizes)
        first = sum(self.sizes[:rank])
        here, rows = slice(rank * n, rank * n + n), slice(first, first + self.sizes[rank])
        return self.run(implementation, here, rows, kind, **more)


@pytest.mark.parametrize("implementation", ["moe_ext", "eager"])
def test_routings(implementation, tmp_path):
    """Uneven ranks and one without tokens; ranks that get none; frozen inputs, weights and experts."""
    sizes = [((5, 3), "xwud"), ((0, 4), "xwud"), ((5, 3), "xw"), ((5, 3), "w"), ((4, 0), "ud"), ((4, 2), "d")]
    cases = [(Layer(routing, of_rank), wanted) for routing in ("random", "rank 0", "one") for of_rank, wanted in sizes]

    def body(rank):
        return [layer.on(rank, implementation, wanted=wanted) for layer, wanted in cases]

    got = run_ranks(2, body, tmp_path)
    for case, (layer, wanted) in enumerate(cases):
        y, grads = layer.run("eager", wanted=wanted)
        equal(torch.cat([of_rank[case][0] for of_rank in got]), y, "y")
        for i, letter in enumerate(wanted):
            equal(torch.cat([of_rank[case][1][i] for of_rank in got]), grads[i], letter)


class Sent(TorchDispatchMode):
    """The bytes of rows, and of counts, that this rank sends to the other of two."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.rows, self.counts = rank, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op == torch.ops.c10d.allgather_.default:
            self.counts += args[1][0].nbytes
        elif op == torch.ops.c10d.alltoall_base_.default:
            self._all_to_all(args[1], args[4])
        elif op == torch.ops._c10d_functional.all_to_all_single.default:
            self._all_to_all(args[0], args[2])
        return op(*args, **kwargs or {})

    def _all_to_all(self, x, splits):
        if splits:
            self.rows += splits[1 - self.rank] * x.shape[1] * x.itemsize
        else:
            self.counts += x.nbytes // 2


def test_bytes(tmp_path):
    """A token goes once to a rank, not once to each of its experts there."""
    layer = Layer("random", (5, 3))

    def body(rank):
        sent = []
        for kind in (TokenExchangeEP, AllToAllEP):
            with Sent(rank) as mode:
                layer.on(rank, "eager", kind)
            sent.append((mode.rows, mode.counts))
        return sent

    got = run_ranks(2, body, tmp_path)
    elsewhere_RT = [(layer.ids[:5] >= E // 2), (layer.ids[5:] < E // 2)]
    tokens, copies = ([int(n) for n in of_rank] for of_rank in zip(
        *((there.any(1).sum(), there.sum()) for there in elsewhere_RT), strict=True))  # fmt: skip
    row = 8 * D
    with_weights = row + 32  # K = 3 of 8 bytes, in sixteens
    with_ids = with_weights + 16
    for rank, (ours, theirs) in enumerate(got):
        back = tokens[1 - rank]
        assert ours[0] == tokens[rank] * (with_ids + row) + back * (row + with_weights)
        assert theirs[0] == 2 * (copies[rank] + copies[1 - rank]) * row
        assert (ours[1], theirs[1]) == (2 * 4 * (2 + 5), E // 2 * 8), "counts: int32 for both ranks; int64 an expert"
    assert sum(ours[0] for ours, _ in got) < 0.75 * sum(theirs[0] for _, theirs in got)


def test_errors(tmp_path):
    layer = Layer("random", (5, 3))

    def body(rank):
        with pytest.raises(ValueError) as disagree:
            layer.on(rank, "moe_ext", wanted="xw" if rank else "w")
        with pytest.raises(ValueError) as mesh:
            there = SimpleNamespace(device_type="xpu", get_group=lambda: dist.group.WORLD, size=lambda: 2)
            TokenExchangeEP(SimpleNamespace(forward=None, num_experts=E), there, there)
        meeting, late = Meeting(dist.new_group(), timedelta(seconds=0.2)), None
        if rank == 0:  # the other one stays away
            with pytest.raises(RuntimeError) as late:
                meeting.rows(torch.zeros(2, 1), torch.ones(2, 2, dtype=torch.int32))
        return [error and str(error.value) for error in (disagree, mesh, late)]

    (*both, late), got = run_ranks(2, body, tmp_path)
    assert got[:2] == both
    assert both[0] == ('ep_implementation="moe_ext": whether hidden_states requires a gradient must be the same on 2 '
                       "ranks, got 0 on rank 0, 1 on rank 1")  # fmt: skip
    assert "a mesh of xpu over None" in both[1] and 'Hint: ep_implementation="all_to_all"' in both[1]
    assert "rank 0 waited in vain for ranks [0, 1] to exchange tokens" in late and "timeout = 0:00:00.2" in late


# ---- training --------------------------------------------------------------------------------------------------------


def train(model, batches, clip):
    """Three steps with gradient checkpointing and frozen experts in the first layer -> norms, whole parameters."""
    model.model.layers[0].mlp.experts.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-3, foreach=False)  # eps above the rounding of the routers
    norms = []
    for _ in range(3):
        step(model, batches)
        norms.append(float(clip(model)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: whole(p.detach()) for name, p in model.named_parameters()}


def test_training_and_saving(saved, tmp_path):
    folder = saved("qwen3_moe")
    norms, want = train(load(folder), UNEVEN, lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5))

    def body(rank):
        model = load(folder, rank, fsdp_size=2, ep_size=2)
        for layer, mine in enumerate(model.model.layers):
            there = load(folder).model.layers[layer].mlp.experts.gate_up_proj
            assert torch.equal(mine.mlp.experts.gate_up_proj.to_local(), there[rank * E // 2 :][: E // 2])
        got = train(model, UNEVEN[rank : rank + 1], lambda model: clip_grad_norm(model.named_parameters(), 0.5))
        model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="experts is spread over ranks"):
            moe_ext.transformers.add_lora(model)
        return got

    for got_norms, got in run_ranks(2, body, tmp_path):
        assert got_norms == pytest.approx(norms, rel=1e-7) and min(norms) > 0.5
        for name in want:
            equal(got[name], want[name], name, 1e-7)
    for name, p in load(tmp_path / "saved").named_parameters():
        equal(p, want[name], name, 1e-7)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_bf16(saved, mode, tmp_path):
    folder, dtype = saved("qwen3_moe"), torch.bfloat16 if mode == "bf16 weights" else torch.float32

    def run(batches, *rank, **mesh):
        model = load(folder, *rank, dtype=dtype, **mesh)
        with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
            return step(model, batches)

    want = run(UNEVEN)
    got = run_ranks(2, lambda rank: run(UNEVEN[rank : rank + 1], rank, fsdp_size=2, ep_size=2), tmp_path)
    same(got, want, 0.08)
