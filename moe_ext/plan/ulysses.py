"""`python -m moe_ext.plan ulysses [--n 60000 --dim 16384 --heads 128 --tp 8 --dp 2 ..]`: attention over a long sequence
shared by ranks, and a stack of MLPs: every shape, FLOP, byte sent and byte held, before anything runs.

Two programs are planned. The first is the one whose log the defaults are those of: forward alone, the scores of all
tokens with all in memory, no softmax. `seed` prints that log again, its memory by CUDA's allocator. The second is ours,
which `moe_ext.check ulysses` runs: `steps` tells what it does, `lines` prints that with the memory that is planned or
was measured.

    P = tp * dp ranks share the N tokens. Each has N/P of them, and all weights of attention; of the MLPs' it has 1/tp,
    and their tokens are those of the tp ranks of its group, whose numbers follow each other.

Bytes are of tensors; GB and MB are decimal. FLOPs are those of matrix products, of all ranks unless it says otherwise.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

from moe_ext.config import ConfigError, Sharing, cli, divisors, nearest, require, ulysses_ranks
from moe_ext.parallel.mlp import Form
from moe_ext.plan.roofline import DEVICES, RESERVE, Device, wires

WIDTHS = {"bf16": 2, "fp32": 4, "fp64": 8}
NAMES = {"bf16": "torch.bfloat16", "fp32": "torch.float32", "fp64": "torch.float64"}


@dataclass(frozen=True)
class Sizes:
    """What is computed, and on how many ranks. ConfigError for what they cannot share."""
    n: int = 60000              # tokens of the sequence
    dim: int = 16384            # of the model: heads of dim / heads columns
    heads: int = 128
    kv_heads: int = 0           # of keys and values; 0: as many as heads
    hidden: int = 53248         # of an MLP
    layers: int = 126           # MLPs, one after the other
    tp: int = 8                 # ranks that share an MLP's weights
    dp: int = 2                 # groups of tp ranks
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    attention: Sharing = "ulysses"      # exchange heads for tokens; or gather keys and values
    mlp: Form = "all-reduce"    # of what the ranks of a group add up; or reduce-scatter
    backward: bool = True       # of attention
    mlp_backward: bool = False  # of the MLPs

    def __post_init__(self):
        for name in ("n", "dim", "heads", "hidden", "layers", "tp", "dp"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; it must be positive")
        require(self.kv_heads >= 0, f"--kv-heads is {self.kv_heads}; it must be positive, or 0 for as many as --heads")
        P, shared = self.ranks, f"the {self.ranks} ranks (--tp {self.tp} * --dp {self.dp})"
        self.divides("heads", "dim", self.heads, self.dim)
        self.divides("kv-heads", "heads", self.kv, self.heads)
        self.divides("tp", "hidden", self.tp, self.hidden)
        below = self.n // P * P
        require(below == self.n, f"--n {self.n} cannot be shared evenly by {shared}: the nearest that can "
                + (f"are {below} and {below + P}" if below else f"is {P}"))
        if self.attention == "gather":
            return
        fit = ulysses_ranks(self.heads, self.kv)
        require(P <= self.heads, f"--heads {self.heads} are fewer than {shared}, and Ulysses gives each a head: take "
                f"at most {fit[-1]} ranks, or --attention gather, which shares no heads")
        require(P in fit, f"{shared} do not share --heads {self.heads} and {self.kv} key/value heads evenly: the "
                f"nearest number that does is {nearest(P, fit)}; --attention gather shares no heads")

    def divides(self, part: str, whole: str, size: int, total: int) -> None:
        require(total % size == 0, f"--{part} {size} does not divide --{whole} {total}: the nearest that does is "
                f"{nearest(size, divisors(total))}")

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def kv(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Columns of a head."""
        return self.dim // self.heads

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTHS[self.dtype]

    @property
    def kv_letter(self) -> str:
        """For the number of key and value heads, beside h."""
        return "h" if self.kv == self.heads else "g"

    @property
    def message(self) -> tuple:
        """q, k and v of all tokens of a rank for each rank, or of some tokens of each: label, *shape."""
        shared = self.local_heads + 2 * self.local_kv
        return f"P, N/P, (h + 2{self.kv_letter})/P, d/h", self.ranks, self.mine, shared, self.head

    @property
    def sum_width(self) -> int:
        """Bytes of a number in which softmax is summed."""
        return max(4, self.width)

    @property
    def causal(self) -> str:
        return f"causal; {amount(4 * self.n ** 2 * self.dim, 'FLOPs')} if every token saw all"

    @property
    def mlp_flops(self) -> int:
        """Of one of the two products in all layers."""
        return 2 * self.n * self.dim * self.hidden * self.layers

    @property
    def project_flops(self) -> int:
        """Of the products that make queries, keys and values."""
        return 2 * self.n * self.dim * (self.heads + 2 * self.kv) * self.head

    @property
    def score_flops(self) -> int:
        """Of queries with keys and scores with values, each token with those up to itself."""
        return 2 * self.n * (self.n + 1) * self.dim

    @property
    def last_score_flops(self) -> int:
        """The same of the last rank's tokens, where each rank has its own."""
        n = self.mine
        return 4 * self.dim * (n * (self.n - n) + n * (n + 1) // 2)

    def exchange(self, heads: int) -> Collective | None:
        """Of all tokens of a rank, so many heads for each rank."""
        P = self.ranks
        return Collective("all-to-all", P, (P - 1) * self.mine * heads * self.head * self.width) if P > 1 else None

    def gathered(self, kind: str) -> Collective | None:
        """Of all ranks' keys and values."""
        P = self.ranks
        return Collective(kind, P, (P - 1) * 2 * self.mine * self.kv * self.head * self.width) if P > 1 else None

    def shared(self, kind: str, times: int = 1) -> Collective | None:
        """Of the tokens of a group's ranks."""
        sent = (self.tp - 1) * self.mine * self.dim * self.width * times
        return Collective(kind, self.tp, sent) if self.tp > 1 else None

    @property
    def mine(self) -> int:
        """Tokens of a rank."""
        return self.n // self.ranks

    @property
    def local_heads(self) -> int:
        """Of each rank in attention, for all tokens."""
        return max(1, self.heads // self.ranks)

    @property
    def local_kv(self) -> int:
        """Of keys and values; fewer than ranks go to several."""
        return max(1, self.kv // self.ranks)


class Tensor(NamedTuple):
    name: str
    label: str                  # its dimensions in letters
    shape: tuple[int, ...]
    width: int                  # bytes of an element

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.width


class Collective(NamedTuple):
    kind: str                   # all-to-all, all-gather, reduce-scatter, all-reduce
    ranks: int                  # that take part, neighbours
    sent: int                   # bytes that each of them sends to the others


class Step(NamedTuple):
    """A part of the program, with what is alive on a rank."""
    phase: str
    name: str                   # within it
    title: str                  # of the report
    tensors: tuple[Tensor, ...]     # what it makes
    flops: int                  # of all ranks
    rank_flops: int             # of the one that has most to do
    remark: str                 # on the FLOPs
    sent: Collective | None
    held: int                   # bytes alive at its end
    most: int                   # and at most, until then
    alive: tuple[Tensor, ...]   # at that moment


class Measured(NamedTuple):
    """Of a step that was run."""
    held: int
    most: int
    seconds: float


class Ledger:
    """Tensors that are alive, the bytes that they hold and held at most. block(bytes): what one of so many occupies."""

    def __init__(self, block=int):
        self.block, self.alive, self.now = block, {}, 0
        self.restart()

    def make(self, tensor: Tensor) -> Tensor:
        """Who had its name is freed then."""
        self.now += self.block(tensor.bytes)
        if self.now > self.most:
            self.most, self.then = self.now, (*self.alive.values(), tensor)
        if tensor.name in self.alive:
            self.free(tensor.name)
        self.alive[tensor.name] = tensor
        return tensor

    def free(self, *names: str) -> None:
        for name in names:
            self.now -= self.block(self.alive.pop(name).bytes)

    def rename(self, old: str, new: str) -> Tensor:
        """Who had the new name is freed."""
        if new in self.alive:
            self.free(new)
        self.alive[new] = self.alive.pop(old)._replace(name=new)
        return self.alive[new]

    def restart(self) -> None:
        """Begin again to look for the most."""
        self.most, self.then = self.now, tuple(self.alive.values())


# ---- the program whose log the defaults are from ---------------------------------------------------------------------
WORKSPACE = 32 * 2**20      # of cuBLAS on Hopper, from the first product on


def block(size: int) -> int:
    """Bytes of CUDA's caching allocator that a new tensor of so many occupies: multiples of 512, and from 10 MiB on a
    piece of its own in multiples of 2 MiB, whose rest is split off if it is larger than 1 MiB."""
    size = -(-size // 512) * 512
    piece = -(-size // 2**21) * 2**21
    return piece if size >= 10 * 2**20 and piece - size <= 2**20 else size


def seed(s: Sizes) -> tuple[list[str], int]:
    """The log of that program, every line but its rank's and NCCL's, in which lines that begin with # are ours; and the
    most bytes that its attention holds. It knows no fewer key and value heads, and no other exchange."""
    P, n, H, d, f, N_DP = s.ranks, s.n // s.ranks, s.heads, s.head, s.hidden // s.tp, s.n // s.dp
    h, scores = H // P, Ledger(block)
    said = [f"seq length: {s.n}", f"hidden dim: {s.dim}", f"num heads: {H}", f"type: {NAMES[s.dtype]}", f"TP: {s.tp}",
            f"DP: {s.dp}", f"P: {P}", f"head per GPU: {h} tokens per GPU: {n}", "", "Ulysses attention"]

    def make(names, label, shape, colon="", letter="M", made=True):
        for name in names.split():
            tensor = Tensor(name, label, shape, s.width)
            if made:
                scores.make(tensor)
            said.append(f"{name} [{label}]: torch.Size({list(shape)}), elements: {tensor.elements}, size{colon} "
                        f"{amount(tensor.bytes, 'B', letter)}")

    def turned(title, names, label, shape):
        """Each is copied in another order."""
        said.append(title)
        for name in names.split():
            make(name, label, shape)
        said.append("is_contiguous: True")

    def flops(count):
        said.append(f"flops: {amount(count, 'FLOPs', 'T')}")

    def peak():
        said.append(f"Peak memory allocation: {amount(scores.most, 'B', 'G')}")

    make("input", "N/P, d", (n, s.dim), ":")
    make("Q K V", "h, d, d/h", (H, s.dim, d), ":")
    make("O", "h, d/h, d", (H, d, s.dim), ":")
    peak()
    said += ["compute q, k, v", "q = input x Q, k = input x K, v = input x V"]
    flops(6 * s.n * s.dim ** 2)
    scores.make(Tensor("workspace", "", (WORKSPACE,), 1))
    make("q k v", "h, N/P, d/h", (H, n, d))
    peak()
    said.append("q_, k_, v_ = all-to-all q, k, v")
    make("q_ k_ v_", "P, h/P, N/P, d/h", (P, h, n, d))
    peak()
    turned("transpose(0, 1) q_, k_, v_ & reshape", "q_ k_ v_", "h/P, N, d/h", (h, s.n, d))
    peak()
    said += ["compute attention", "A = q_ x k_t"]
    flops(2 * s.n ** 2 * s.dim)
    make("A", "h/P, N, N", (h, s.n, s.n), letter="G")
    said.append("is_contiguous: True")
    peak()
    said += ["compute c", "c = A x v_"]
    flops(2 * s.n ** 2 * s.dim)
    make("c", "h/P, N, d/h", (h, s.n, d))
    said.append("is_contiguous: True")
    peak()
    turned("transpose(0, 1) c", "c", "N, h/P, d/h", (s.n, h, d))
    peak()
    said.append("c_ = all-to-all c")
    make("c_", "P, N/P, h/P, d/h", (P, n, h, d))
    peak()
    turned("transpose(0, 1) c_ & reshape c_ and O", "c_", "N/P, d", (n, s.dim))
    make("O", "d, d", (s.dim, s.dim), made=False)
    peak()
    said += ["compute output", "output = c x O"]
    flops(2 * s.n * s.dim ** 2)
    make("output", "N/P, d", (n, s.dim))
    peak()
    attention_most = scores.most
    scores.free(*(set(scores.alive) - {"output", "workspace"}))
    said += [f"TP ranks: {list(range(s.tp))}", "", "2D Model parallel"]
    make("input_", "N/DP/TP, d", (N_DP, s.dim), ":", "G")
    said.append("# the label is wrong: it is [N/DP, d], gathered by the TP ranks, and its next version says so")
    make("W1", "L, d, d'/TP", (s.layers, s.dim, f), ":", "G")
    make("W2", "L, d'/TP, d", (s.layers, f, s.dim), ":", "G")
    said.append("inter = input x W1")
    said.append(f"# its next version goes on: flops: {amount(2 * s.layers * N_DP * s.dim * s.hidden, 'FLOPs', 'T')}")
    make("inter", "N/DP, d'/TP", (N_DP, f), ":")
    said += ["# activation f(inter)", "# output = inter x W2",
             f"# flops: {amount(2 * s.layers * N_DP * s.dim * s.hidden, 'FLOPs', 'T')}",
             f"Current memory allocation: {amount(scores.now, 'B', 'G')}"]
    peak()
    return said, attention_most


# ---- our program -----------------------------------------------------------------------------------------------------
ATTEND, AGAIN = "c = softmax(q_ x k_t / sqrt(d/h), causal) x v_", "dq_, dk_, dv_ of it, the scores made again"
OUTPUT = "output = c_ x O"


class Program(Ledger):
    """What a rank holds, step by step."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, self.steps = sizes, []

    def new(self, name: str, label: str, *shape: int, width: int = 0) -> Tensor:
        return self.make(Tensor(name, label, shape, width or self.sizes.width))

    def step(self, phase: str, name: str, title: str, *tensors: Tensor, flops=0, rank_flops=0, remark="", sent=None):
        """All that was made and freed since the last one. Of a step of the same phase and name it is another part."""
        step = Step(phase, name, title, tensors, flops, rank_flops or flops // self.sizes.ranks, remark, sent, self.now,
                    self.most, self.then)
        self.restart()
        for i, before in enumerate(self.steps):
            if (before.phase, before.name) == (phase, name):
                most = max(before, step, key=lambda part: part.most)
                self.steps[i] = before._replace(held=step.held, most=most.most, alive=most.alive)
                return
        self.steps.append(step)


def steps(sizes: Sizes) -> list[Step]:
    """Our program. The (phase, name) of each step, in this order; those in brackets are not always there:

    "attention": input, qkv, exchange, attend, (back,) output; "backward": output, (back,) attend, exchange, qkv;
    "MLP": input, then each for all layers together (gather,) inter, activation, output, sum; "MLP backward": sum,
    output, activation, inter, (gather,) input.
    """
    program = Program(sizes)
    attention(program)
    if sizes.backward:
        backward(program)
    program.free(*(set(program.alive) - {"output"}))
    program.restart()
    stack(program)
    if sizes.mlp_backward:
        stack_backward(program)
    return program.steps


def attention(m: Program) -> None:
    """x [n,D] -> output [n,D] of n = N/P tokens, as moe_ext.parallel.sequence and torch's flash kernel do it."""
    s = m.sizes
    n, H, G, d, D, g = s.mine, s.heads, s.kv, s.head, s.dim, s.kv_letter
    m.step("attention", "input", "input and weights", m.new("input", "N/P, d", n, D), m.new("Q", "d, d", D, D),
           *(m.new(name, "d, d" if g == "h" else "d, g d/h", D, G * d) for name in "KV"), m.new("O", "d, d", D, D))
    m.step("attention", "qkv", "q = input x Q, k = input x K, v = input x V", m.new("q", "N/P, h, d/h", n, H, d),
           *(m.new(name, f"N/P, {g}, d/h", n, G, d) for name in "kv"), flops=s.project_flops)
    (heads_for_tokens if s.attention == "ulysses" else keys_of_all)(m)


def heads_for_tokens(m: Program) -> None:
    """Attention of all tokens with some heads."""
    s = m.sizes
    P, n, D, h, d = s.ranks, s.mine, s.dim, s.local_heads, s.head
    m.new("message", *s.message)
    if P > 1:
        m.new("q_ k_ v_", *s.message)
        m.free("message")
    else:
        m.rename("message", "q_ k_ v_")
    m.step("attention", "exchange", "q_, k_, v_ = all-to-all q, k, v, in one message", m.alive["q_ k_ v_"],
           sent=s.exchange(h + 2 * s.local_kv))

    made = m.new("c", "N, h/P, d/h", s.n, h, d), m.new("logsumexp", "N, h/P", s.n, h, width=s.sum_width)
    if not s.backward:
        m.free("logsumexp")
    m.step("attention", "attend", ATTEND, *made, flops=s.score_flops, remark=s.causal)

    made, turned = [], False        # a token's heads are not side by side, unless each rank has one
    if P > 1:
        made.append(m.new("c_", "P, N/P, h/P, d/h", P, n, h, d))
        turned = h > 1
        if turned:
            made.append(m.new("c_", "N/P, d", n, D))
    m.free("q", "k", "v")
    if not s.backward:
        m.free("q_ k_ v_", *["c"] * (P > 1))
    m.step("attention", "back", "c_ = all-to-all c" + "; transpose & reshape" * turned, *made, sent=s.exchange(h))
    if P > 1 and not turned:
        m.rename("c_", "received")
        m.new("c_", "N/P, d", n, D)
    output, used = m.new("output", "N/P, d", n, D), "c_" if P > 1 else "c"
    if not s.backward and "received" in m.alive:
        m.free(used)
        used = "received"
    m.step("attention", "output", OUTPUT, output, flops=2 * s.n * D ** 2)
    if not s.backward:
        m.free(used)
    elif "received" in m.alive:
        m.free("received")


def keys_of_all(m: Program) -> None:
    """Attention of a rank's tokens with all heads; of the last one, which sees all keys. Its tokens before the others'
    and among themselves are two calls of the kernel, joined in at least fp32."""
    s = m.sizes
    P, n, H, G, d = s.ranks, s.mine, s.heads, s.kv, s.head
    m.new("k v", f"2, {s.kv_letter}, N/P, d/h", 2, G, n, d)
    if P > 1:
        m.new("received", f"P, 2, {s.kv_letter}, N/P, d/h", P, 2, G, n, d)
        m.new("k_ v_", f"2, {s.kv_letter}, N, d/h", 2, G, s.n, d)
        m.free("k v", "received")
    else:
        m.rename("k v", "k_ v_")
    m.step("attention", "exchange", "k_, v_ = all-gather k, v", m.alive["k_ v_"], sent=s.gathered("all-gather"))

    if P == 1:
        made = m.new("c", "N/P, h, d/h", n, H, d), m.new("logsumexp", "N/P, h", n, H, width=s.sum_width)
    else:
        for part in " 1", " 2":
            m.new("c" + part, "N/P, h, d/h", n, H, d)
            m.new("logsumexp" + part, "N/P, h", n, H, width=s.sum_width)
        made = [m.new("logsumexp", "N/P, h", n, H, width=s.sum_width)]
        wide = [m.new(f"c {part} wide", "N/P, h, d/h", n, H, d, width=4).name for part in "12" if s.width < 4]
        m.new("share", "N/P, h", n, H, width=s.sum_width)
        made.insert(0, m.new("c", "N/P, h, d/h", n, H, d, width=s.sum_width))
        m.free(*wide, "share")
        if wide:
            made[0] = m.new("c", "N/P, h, d/h", n, H, d)
        m.free("c 1", "logsumexp 1", "c 2", "logsumexp 2")
    if not s.backward:
        m.free("logsumexp")
    m.step("attention", "attend", ATTEND, *made, flops=s.score_flops, remark=s.causal,
           rank_flops=s.last_score_flops)
    m.free("k", "v", *[] if s.backward else ["q", "k_ v_"])
    m.step("attention", "output", OUTPUT, m.new("output", "N/P, d", n, s.dim), flops=2 * s.n * s.dim ** 2)
    if not s.backward:
        m.free("c")


def backward(m: Program) -> None:
    """Gradients of attention, in the order in which autograd makes them and frees what it has kept."""
    s = m.sizes
    P, n, H, G, d, D, ulysses = s.ranks, s.mine, s.heads, s.kv, s.head, s.dim, s.attention == "ulysses"
    made = m.new("doutput", "N/P, d", n, D), m.new("dO", "d, d", D, D), m.new("dc_", "N/P, d", n, D)
    if P > 1 and ulysses:
        m.free("c_")
    m.step("backward", "output", "dO = c_t x doutput, dc_ = doutput x O_t", *made, flops=4 * s.n * D ** 2)
    own = (tokens_for_heads if ulysses else keys_back)(m)

    made, message = [], "dq dk dv" if ulysses else "dk dv"
    for name, heads in (("dv", G), ("dk", G), ("dq", H)):
        turned = P > 1 if ulysses else name != "dq"
        if turned:
            m.new("turned", "N/P, h, d/h", n, heads, d)
            if name in own:
                m.free(name)
        if message in m.alive and turned and (name == "dq" or (name == "dk" and "dq" in own)):
            m.free(message)
        made.append(m.new(f"d{name[1].upper()}", "d, d" if heads == H else "d, g d/h", D, heads * d))
        m.new("dinput" if name == "dv" else "its part", "N/P, d", n, D)
        if turned:
            m.free("turned")
        elif name in own:
            m.free(name)
        elif name == "dq":
            m.free(message)
        if name != "dv":
            m.new("dinput", "N/P, d", n, D)
            m.free("its part")
    m.step("backward", "qkv", "dV, dK, dQ = input_t x dv, dk, dq; dinput = dv x V_t + dk x K_t + dq x Q_t", *made,
           m.alive["dinput"], flops=2 * s.project_flops)


def tokens_for_heads(m: Program) -> list[str]:
    """-> which of dq, dk and dv are no views of the message."""
    s = m.sizes
    P, n, h, g, d, letter = s.ranks, s.mine, s.local_heads, s.local_kv, s.head, s.kv_letter
    if P > 1:
        m.new("message", "P, N/P, h/P, d/h", P, n, h, d)
        m.new("dc", "N, h/P, d/h", s.n, h, d)
        m.free("message", "dc_")
    else:
        m.rename("dc_", "dc")
    m.step("backward", "back", "dc = all-to-all dc_", m.alive["dc"], sent=s.exchange(h))
    made = [m.new(name, f"N, {one}/P, d/h", s.n, heads, d) for name, one, heads in
            (("dq_", "h", h), ("dk_", letter, g), ("dv_", letter, g))]
    m.free("dc", "q_ k_ v_", "c", "logsumexp")
    m.step("backward", "attend", AGAIN, *made, flops=5 * s.score_flops // 2, remark="causal")

    m.new("message", *s.message)
    m.free("dq_", "dk_", "dv_")
    if P > 1:
        m.new("dq dk dv", *s.message)
        m.free("message")
    else:
        m.rename("message", "dq dk dv")
    received, own = m.alive["dq dk dv"], []
    for name, heads, local in (("dq", s.heads, h), ("dk", s.kv, g), ("dv", s.kv, g)):
        if P > 1 and (local > 1 or heads < P):
            own.append(m.new(name, "h, N/P, d/h", heads, n, d).name)
    if len(own) == 3:
        m.free("dq dk dv")
    m.step("backward", "exchange", "dq, dk, dv = all-to-all dq_, dk_, dv_, in one message", received,
           sent=s.exchange(h + 2 * g))
    return own


def keys_back(m: Program) -> list[str]:
    """-> the same, of the gathered form."""
    s = m.sizes
    P, n, H, G, d, g = s.ranks, s.mine, s.heads, s.kv, s.head, s.kv_letter
    sizes = [(" 1", s.n - n), (" 2", n)] if P > 1 else [("", n)]
    for part, keys in sizes:
        m.new("dq" + part, "N/P, h, d/h", n, H, d)
        m.new("dk_" + part, f"N, {g}, d/h", keys, G, d)
        m.new("dv_" + part, f"N, {g}, d/h", keys, G, d)
    if P > 1:
        m.new("dq", "N/P, h, d/h", n, H, d)
        m.new("dk_", f"N, {g}, d/h", s.n, G, d)
        m.new("dv_", f"N, {g}, d/h", s.n, G, d)
        m.free(*(name + part for name in ("dq", "dk_", "dv_") for part in (" 1", " 2")))
    m.free("dc_", "q", "k_ v_", "c", "logsumexp")
    m.step("backward", "attend", AGAIN, *(m.alive[name] for name in ("dq", "dk_", "dv_")),
           flops=5 * s.score_flops // 2, rank_flops=5 * s.last_score_flops // 2, remark="causal")
    m.new("dk dv", f"2, {g}, N, d/h", 2, G, s.n, d)
    m.free("dk_", "dv_")
    if P > 1:
        m.new("message", f"P, 2, {g}, N/P, d/h", P, 2, G, n, d)
        m.new("received", f"P, 2, {g}, N/P, d/h", P, 2, G, n, d)
        m.new("sum", f"2, {g}, N/P, d/h", 2, G, n, d)
        m.free("dk dv", "message", "received")
        m.rename("sum", "dk dv")
    m.step("backward", "exchange", "dk, dv = reduce-scatter dk_, dv_", m.alive["dk dv"],
           sent=s.gathered("reduce-scatter"))
    return ["dq"]


def stack(m: Program) -> None:
    """L MLPs as moe_ext.parallel.mlp does them, of N/DP tokens on each rank of a group."""
    s, flops = m.sizes, m.sizes.mlp_flops
    tp, D, f, T, L, reduced = s.tp, s.dim, s.hidden // s.tp, s.n // s.dp, s.layers, s.mlp == "all-reduce"
    made = [m.new("input_", "N/DP, d", T, D)] if reduced and tp > 1 else []
    m.step("MLP", "input", "input_ = all-gather output; weights" if made else "weights", *made,
           m.new("W1", "L, d, d'/TP", L, D, f), m.new("W2", "L, d'/TP, d", L, f, D),
           sent=s.shared("all-gather") if made else None)
    for layer in range(L):
        kept = f" {layer}" if s.mlp_backward else ""        # for the backward, of each layer
        own = [] if layer == 0 else ["x"]                   # what this layer takes, if no one else holds it
        if not reduced and tp > 1:
            m.step("MLP", "gather", "input_ = all-gather x", m.new(f"input_{kept}", "N/DP, d", T, D),
                   sent=s.shared("all-gather", L))
            m.free(*own)
            own = ["input_"]
        m.step("MLP", "inter", "inter = input_ x W1", m.new(f"inter{kept}", "N/DP, d'/TP", T, f), flops=flops)
        if not kept:
            m.free(*own)
        m.step("MLP", "activation", "activation f(inter)", m.new(f"f(inter){kept}", "N/DP, d'/TP", T, f))
        if not kept:
            m.free("inter")
        product = m.new("product" if tp > 1 else f"x{kept}", "N/DP, d", T, D)
        m.step("MLP", "output", "output = f(inter) x W2", product, flops=flops)
        if not kept:
            m.free("f(inter)")
        if tp == 1:
            continue
        m.new("received", "TP, N/DP/TP, d", tp, T // tp, D)
        x = m.new("piece", "N/DP/TP, d", T // tp, D)
        m.free("received")
        if reduced:
            x = m.new(f"x{kept}", "N/DP, d", T, D)
            m.free("piece")
            m.step("MLP", "sum", "x = all-reduce output", x, sent=s.shared("all-reduce", 2 * L))
        else:
            m.step("MLP", "sum", "x = reduce-scatter output", m.rename("piece", "x"),
                   sent=s.shared("reduce-scatter", L))
        m.free("product")


def stack_backward(m: Program) -> None:
    """Their gradients, from the last layer to the first."""
    s, flops = m.sizes, 2 * m.sizes.mlp_flops
    tp, D, f, T, L, reduced = s.tp, s.dim, s.hidden // s.tp, s.n // s.dp, s.layers, s.mlp == "all-reduce"
    tokens = T if reduced else T // tp
    incoming = m.new("dy", "N/DP, d" if reduced else "N/DP/TP, d", tokens, D).name
    for layer in reversed(range(L)):
        if tp > 1 and reduced:
            m.new("received", "TP, N/DP/TP, d", tp, T // tp, D)
            m.new("piece", "N/DP/TP, d", T // tp, D)
            m.free("received")
        product = m.new("dproduct", "N/DP, d", T, D) if tp > 1 else m.alive[incoming]
        if tp > 1 and reduced:
            m.free("piece")
        if tp > 1 and incoming != "dy":
            m.free(incoming)
        if tp > 1:
            title, kind, times = (("dproduct = all-reduce dx", "all-reduce", 2 * L) if reduced else
                                  ("dproduct = all-gather dx", "all-gather", L))
            m.step("MLP backward", "sum", title, product, sent=s.shared(kind, times))
        m.new(f"dW2 {layer}", "d'/TP, d", f, D)
        inner = m.new("df(inter)", "N/DP, d'/TP", T, f)
        m.free(f"f(inter) {layer}", *["dproduct"] * (tp > 1), *[incoming] * (tp == 1 and incoming != "dy"))
        m.step("MLP backward", "output", "dW2 = f(inter)_t x dproduct, df(inter) = dproduct x W2_t",
               m.alive[f"dW2 {layer}"], inner, flops=flops)
        inner = m.new("dinter", "N/DP, d'/TP", T, f)
        m.free("df(inter)", f"inter {layer}")
        m.step("MLP backward", "activation", "dinter = df(inter) x f'(inter)", inner)
        made = m.new(f"dW1 {layer}", "d, d'/TP", D, f), m.new("dx", "N/DP, d", T, D)
        m.free("dinter")
        if not reduced and tp > 1:
            m.free(f"input_ {layer}")
        elif layer:
            m.free(f"x {layer - 1}")
        m.step("MLP backward", "inter", "dW1 = input_t x dinter, dx = dinter x W1_t", *made, flops=flops)
        incoming = "dx"
        if not reduced and tp > 1:
            m.new("received", "TP, N/DP/TP, d", tp, T // tp, D)
            m.new("piece", "N/DP/TP, d", T // tp, D)
            m.free("received")
            m.rename("piece", "dx")
            m.step("MLP backward", "gather", "dx = reduce-scatter dx", m.alive["dx"],
                   sent=s.shared("reduce-scatter", L))
    if reduced and tp > 1:
        m.new("received", "TP, N/DP/TP, d", tp, T // tp, D)
        m.new("doutput", "N/P, d", T // tp, D)
        m.free("received", "dx")
        m.step("MLP backward", "input", "doutput = reduce-scatter dinput_", m.alive["doutput"],
               sent=s.shared("reduce-scatter"))


# ---- the report ------------------------------------------------------------------------------------------------------
PHASES = {"attention": "Attention", "backward": "Attention, backward", "MLP": "MLPs", "MLP backward": "MLPs, backward"}
UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def lines(sizes: Sizes, steps: list[Step], measured: list[Measured] | None = None, device: Device | None = None,
          per_host: int = 8) -> list[str]:
    """The report of the steps, a title and what it is made of for each; with what was measured of them, or with the
    time that a device needs at least."""
    s, said, phase = sizes, [], ""
    said.append(f"{s.n} tokens, {s.n // s.ranks} of each of {s.ranks} ranks (TP {s.tp}, DP {s.dp}); {s.dtype}; heads: "
                f"{s.heads} of {s.head} columns, {s.kv} of keys and values")
    for i, step in enumerate(steps):
        if step.phase != phase:
            phase = step.phase
            said += ["", f"{PHASES[phase]}{f' ({s.attention})' if phase == 'attention' else ''}"
                         f"{f' ({s.layers} layers, {s.mlp})' if phase == 'MLP' else ''}"]
        seconds = measured[i].seconds if measured else ideal(step, s, device, per_host) if device else None
        said.append(step.title)
        said += [f"  {t.name} [{t.label}]: {list(t.shape)}, elements: {t.elements}, size: {amount(t.bytes, 'B')}"
                 for t in step.tensors]
        if step.flops:
            said.append(f"  flops: {amount(step.flops, 'FLOPs')}, {amount(step.rank_flops, 'FLOPs')} of a rank"
                        f"{f' ({step.remark})' if step.remark else ''}{pace(seconds, step.rank_flops, 'FLOP/s')}")
        if step.sent:
            said.append(f"  {step.sent.kind} among {step.sent.ranks}: {step.sent.sent} bytes sent by a rank"
                        f"{pace(seconds, step.sent.sent, 'B/s')}")
        planned = f"{amount(step.held, 'B')}, at most {amount(step.most, 'B')}"
        if measured:
            now, most = measured[i][:2]
            said.append(f"  memory: {amount(now, 'B')}, at most {amount(most, 'B')} (planned {planned}: "
                        f"{now / step.held - 1:+.1%}, {most / step.most - 1:+.1%})")
        else:
            said.append(f"  memory: {planned}")
    return said + totals(steps, measured)


def totals(steps: list[Step], measured: list[Measured] | None) -> list[str]:
    """Of each phase: the most that is held, and by what; the bytes that a rank sends."""
    said = [""]
    for phase, name in PHASES.items():
        own = [step for step in steps if step.phase == phase]
        if not own:
            continue
        fullest = max(own, key=lambda step: step.most)
        held = {}
        for tensor in fullest.alive:
            each = re.sub(r" \d+$", "", tensor.name)
            count, size = held.get(each, (0, 0))
            held[each] = count + 1, size + tensor.bytes
        inventory = ", ".join(f"{f'{count} x ' if count > 1 else ''}{each} {amount(size, 'B')}"
                              for each, (count, size) in held.items())
        sent = sum(step.sent.sent for step in own if step.sent)
        held_most = f"{amount(fullest.most, 'B')} alive"
        if measured:
            got = max(each.most for step, each in zip(steps, measured, strict=True) if step.phase == phase)
            held_most = f"{amount(got, 'B')} alive; planned {amount(fullest.most, 'B')}"
        said.append(f"{name}: at most {held_most}, in \"{fullest.title}\": {inventory}")
        said.append(f"{name}: {amount(sum(step.flops for step in own), 'FLOPs')}, "
                    f"{amount(sum(step.rank_flops for step in own), 'FLOPs')} of a rank, which sends {sent} bytes")
    return said


def pace(seconds: float | None, size: float, unit: str) -> str:
    """In so many seconds."""
    return f"; {seconds * 1e3:.4g} ms, {amount(size / seconds, unit)}" if seconds else ""


def ideal(step: Step, s: Sizes, device: Device, per_host: int) -> float | None:
    """Seconds of a step at the peaks of its products and links; None in fp64, of which no peak is known."""
    if step.sent:
        kind, ranks, sent = step.sent
        on_link, on_network = wires(sent, ranks, 1, per_host, exchange=kind == "all-to-all")
        return max(on_link / device.link, on_network / device.network) / 1e9
    peak = {"bf16": device.tflops, "fp32": device.tflops_fp32}.get(s.dtype)
    return step.rank_flops / peak / 1e12 if peak else None


def amount(size: float, unit: str, letter: str = "") -> str:
    """Two decimals, in the largest unit of which there is one: (122_880_000, "B") -> "122.88 MB"; or in a given one, if
    that shows anything: (983_040_000, "B", "G") -> "0.98 GB"."""
    if not letter or size < 0.095 * UNITS[letter]:
        letter = next((letter for letter, each in UNITS.items() if size >= each), "")
    return f"{size / UNITS[letter]:.{2 * bool(letter)}f} {letter}{unit}"


# ---- the command -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Command(Sizes):
    """Plan attention over a long sequence that ranks share, and a stack of MLPs."""
    device: str = "h100"        # whose memory and peaks: a100, a100-40gb, h100, h100-pcie, h200, b200, l40s, rtx4090
    per_host: int = 8           # devices of a host

    def __post_init__(self):
        super().__post_init__()
        require(self.device in DEVICES, f"--device: got {self.device!r}, wanted one of {', '.join(DEVICES)}")
        require(self.per_host > 0, f"--per-host is {self.per_host}; it must be positive")


def main(args: list[str]) -> None:
    """Errors: ConfigError for sizes that ranks cannot share or that the device cannot hold."""
    print(report(cli(Command, args, Command(), "moe_ext.plan ulysses")))


def report(c: Command) -> str:
    s, device = Sizes(**{f.name: getattr(c, f.name) for f in fields(Sizes)}), DEVICES[c.device]
    planned = steps(s)
    fit(s, planned, device)
    said, theirs = [], 0
    if s.heads % s.ranks == 0:
        text, theirs = seed(s)
        said += ["# What a program that keeps all scores prints; lines with # are not its own", *text, ""]
    said += ["# Ours", *lines(s, planned, device=device, per_host=c.per_host), ""]

    forward = most(planned if not s.backward else steps(replace(s, backward=False)), "attention")
    with_cublas = amount(forward + WORKSPACE, "B")
    said.append(f"attention forward: {amount(forward, 'B')} at most, {with_cublas} with the workspace of cuBLAS"
                + (f"; that program: {amount(theirs, 'B')}, without softmax" if theirs else ""))
    if s.backward:
        kernel = s.n * s.local_heads * s.head * 4 if s.attention == "ulysses" else s.mine * s.dim * 4
        both = max(most(planned, "attention"), most(planned, "backward"))
        said.append(f"attention with backward: {amount(both, 'B')} at most"
                    + (f"; on a GPU flash adds {amount(kernel, 'B')}, in which it sums dq in fp32, while it runs"
                       if s.dtype == "bf16" else ""))
    for form in ("all-reduce", "reduce-scatter"):
        own = [step for step in steps(replace(s, mlp=form)) if step.phase == "MLP"]
        name = "all-reduce" if form == "all-reduce" else "reduce-scatter and all-gather"
        said.append(f"MLPs with {name}: {amount(most(own, 'MLP'), 'B')} at most, a rank sends "
                    f"{sum(step.sent.sent for step in own if step.sent)} bytes")
    for phase, name in PHASES.items():
        times = [ideal(step, s, device, c.per_host) for step in planned if step.phase == phase]
        if times and s.dtype != "fp64":
            said.append(f"{name} on {s.ranks} x {c.device}: at least {sum(times) * 1e3:.4g} ms, a step at a time")
    return "\n".join(said)


def most(steps: list[Step], phase: str) -> int:
    return max(step.most for step in steps if step.phase == phase)


def fit(s: Sizes, planned: list[Step], device: Device) -> None:
    """ConfigError, with what would fit, if the device cannot hold the steps."""
    room = device.memory * 1e9 * (1 - RESERVE)

    def fits(**changes) -> bool:
        try:
            return max(step.most for step in steps(replace(s, **changes))) <= room
        except ConfigError:
            return False

    fullest = max(planned, key=lambda step: step.most)
    if fullest.most <= room:
        return
    low, high = 0, s.mine           # tokens of a rank, of which low fit and high do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(n=middle * s.ranks) else (low, middle)
    longest = f"--n {low * s.ranks} is the longest sequence that does" if low else "no --n does"
    choices = ((ranks, tp) for ranks in divisors(s.n)
               for tp in sorted(divisors(ranks), key=lambda tp: abs(tp - s.tp)) if s.hidden % tp == 0)
    ranks, tp = next((pair for pair in choices if fits(tp=pair[1], dp=pair[0] // pair[1])), (0, 0))
    fewest = (f"for --n {s.n} {ranks} ranks are the fewest: --tp {tp} --dp {ranks // tp}" if ranks else
              f"for --n {s.n} no number of ranks does")
    attention = fullest.phase in ("attention", "backward")
    less = [option for option, helps in (
        ("--no-backward", attention and s.backward), ("--no-mlp-backward", not attention and s.mlp_backward),
        ("--mlp reduce-scatter", not attention and s.tp > 1 and s.mlp == "all-reduce"),
        ("fewer --layers", not attention and s.layers > 1)) if helps]
    raise ConfigError(f"--n {s.n} on {s.ranks} ranks does not fit {device.name}: a rank holds "
                      f"{amount(fullest.most, 'B')} in {PHASES[fullest.phase]}, \"{fullest.title}\", and of its "
                      f"{device.memory:g} GB {amount(room, 'B')} are to be had. On these ranks {longest}; {fewest}"
                      + (f". Less is needed with {', or '.join(less)}" if less else ""))
