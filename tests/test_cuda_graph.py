"""No op waits for the device or takes memory behind torch's back: each, and the dropless layer with its backward, is
captured in a CUDA graph, and a replay on new values gives the bits of the eager call."""

import devices
import pytest
import torch

LAYER = """
torch.manual_seed(0)
layer = moe_ext.FusedMoE(64, 96, 8, 2, bias=True, balance_weight=0.01, z_weight=0.001, dtype=dtype, device=device)
x = torch.randn(3, 37, 64, device=device, dtype=dtype, requires_grad=True)
dy = torch.randn_like(x)

def step():
    x.grad = None
    layer.zero_grad()
    y, routing = layer(x)
    ((y * dy).sum() + routing.loss).backward()
    return [y.detach(), routing.loss.detach(), routing.counts_E, x.grad, *(p.grad for p in layer.parameters())]

side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3):
        step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
for seed in range(4):
    torch.manual_seed(seed)
    with torch.no_grad():
        x.copy_(torch.randn_like(x) * (1 + seed))       # another routing every time
        for p in layer.parameters():
            p.neg_()                                    # a step of the optimizer, in place
    graph.replay()
    got = [t.clone() for t in captured]
    assert all(torch.equal(g, w) for g, w in zip(got, step(), strict=True)), f"replay {seed} is not the eager step"
moe_ext.synchronize()
print("replays equal eager")
"""

HELD = """
import cublas
table = cublas.load()
bins = torch.tensor([70, 70, 200], dtype=torch.int32, device=device)
x, w, dy = (torch.randn(size, device=device).to(dtype) for size in ((200, 72), (3, 72, 136), (200, 136)))

def call():
    return moe_ext.ops.grouped_gemm(x, w, bins), moe_ext.ops.grouped_gemm_wgrad(x, dy, bins)

call()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured, ran = cublas.ways(table, call)
hopper = torch.cuda.get_device_capability() == (9, 0) and dtype != torch.float32
assert sum(ran.values()) == 2 and ("gemm.cuh" not in ran) == hopper, ran

def replay():
    _, ran = cublas.ways(table, graph.replay)
    assert not ran, "a replay encodes nothing anew"
    return [t.clone() for t in captured]

x.neg_(), bins.copy_(torch.tensor([0, 130, 200]))       # new contents at the addresses of the capture
assert all(map(torch.equal, replay(), call()))
held, old, x = replay(), x, x * 2                       # an address that the graph does not know
assert all(map(torch.equal, replay(), held)) and not torch.equal(call()[0], held[0])
moe_ext.synchronize()
"""

OPS = """
from test_compile import record
captured = 0
for (name, *_), (op, args, kwargs) in record(device).items():
    if name == "moe_ext::check":                        # waits by design
        continue
    def call():
        return op(*(a.detach().clone() if torch.is_tensor(a) else a for a in args), **kwargs)
    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    torch.cuda.synchronize()
    got, want = ([r] if torch.is_tensor(r) else list(r) for r in (got, want))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), name
    captured += 1
print(captured, "calls replayed")
"""

pytestmark = pytest.mark.skipif("cuda" not in devices.DEVICES, reason="needs a GPU")


def run(program):
    done = devices.python(program, "cuda", MOE_CHECK="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dropless_layer(dtype, device):
    run(f"dtype = {dtype}\n{LAYER}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_graph_holds(dtype, device):
    """The addresses of its capture, tensor maps too (docs/hopper.md)."""
    run(f"dtype = {dtype}\n{HELD}")


def test_every_op(device):
    run(OPS)
