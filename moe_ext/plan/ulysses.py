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
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_ext.config import divisors, nearest, require

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
    attention: Literal["ulysses", "gather"] = "ulysses"     # exchange heads for tokens; or gather keys and values
    mlp: Literal["all-reduce", "reduce-scatter"] = "all-reduce"     # of what the ranks of a group add up
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
        fit = [r for r in divisors(self.heads) if self.kv % r == 0 or r % self.kv == 0]
        require(P <= self.heads, f"--heads {self.heads} are fewer than {shared}, and Ulysses gives each a head: take at "
                f"most {fit[-1]} ranks, or --attention gather, which shares no heads")
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
    def mine(self) -> int:
        """Tokens of a rank."""
        return self.n // self.ranks

    @property
    def local_heads(self) -> int:
        """Of each rank in attention, for all tokens."""
        return self.heads // self.ranks

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
    ranks: int                  # neighbours
    sent: int                   # bytes that each of them sends to the others


class Step(NamedTuple):
    """A part of the program, with what is alive on a rank."""
    phase: str                  # attention, backward, MLP
    name: str                   # within it
    title: str                  # of the report
    tensors: tuple[Tensor, ...]     # what it makes
    flops: int                  # of all ranks
    rank_flops: int             # of the one that has most to do
    remark: str                 # on the FLOPs
    collectives: tuple[Collective, ...]
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


def seed(s: Sizes) -> list[str]:
    """The log of that program, every line but its rank's and NCCL's; lines that begin with # are ours."""
    P, n, H, d, f, N_DP = s.ranks, s.n // s.ranks, s.heads, s.head, s.hidden // s.tp, s.n // s.dp
    h, weights, scores = H // P, ("Q", "K", "V", "O"), Ledger(block)
    said = [f"seq length: {s.n}", f"hidden dim: {s.dim}", f"num heads: {H}", f"type: {NAMES[s.dtype]}", f"TP: {s.tp}",
            f"DP: {s.dp}", f"P: {P}", f"head per GPU: {h} tokens per GPU: {n}", "", "Ulysses attention"]

    def make(names, label, shape, colon="", unit="MB", made=True):
        for name in names.split():
            tensor = Tensor(name, label, shape, s.width)
            if made:
                scores.make(tensor)
            said.append(f"{name} [{label}]: torch.Size({list(shape)}), elements: {tensor.elements}, size{colon} "
                        f"{amount(tensor.bytes, unit)}")

    def turned(title, names, label, shape):
        """Each is copied in another order."""
        said.append(title)
        for name in names.split():
            make(name, label, shape)
        said.append("is_contiguous: True")

    def flops(count):
        said.append(f"flops: {amount(count, 'T')}FLOPs")

    def peak():
        said.append(f"Peak memory allocation: {amount(scores.most, 'GB')}")

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
    make("A", "h/P, N, N", (h, s.n, s.n), unit="GB")
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
    for name in set(scores.alive) - {"output", "workspace"}:
        scores.free(name)
    said += [f"TP ranks: {list(range(s.tp))}", "", "2D Model parallel"]
    make("input_", "N/DP/TP, d", (N_DP, s.dim), ":", "GB")
    said.append("# the label is wrong: it is [N/DP, d], gathered by the TP ranks, and its next version says so")
    make("W1", "L, d, d'/TP", (s.layers, s.dim, f), ":", "GB")
    make("W2", "L, d'/TP, d", (s.layers, f, s.dim), ":", "GB")
    said.append("inter = input x W1")
    said.append(f"# its next version goes on: flops: {amount(2 * s.layers * N_DP * s.dim * s.hidden, 'T')}FLOPs")
    make("inter", "N/DP, d'/TP", (N_DP, f), ":")
    said += ["# activation f(inter)", "# output = inter x W2",
             f"# flops: {amount(2 * s.layers * N_DP * s.dim * s.hidden, 'T')}FLOPs",
             f"Current memory allocation: {amount(scores.now, 'GB')}"]
    peak()
    return said


# ---- our program -----------------------------------------------------------------------------------------------------
class Program:
    """What a rank holds, step by step."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.ledger, self.steps = sizes, Ledger(), []

    def make(self, name: str, label: str, *shape: int, width: int = 0) -> Tensor:
        return self.ledger.make(Tensor(name, label, shape, width or self.sizes.width))

    def step(self, phase: str, name: str, title: str, *tensors: Tensor, flops=0, rank_flops=0, remark="", sent=None):
        """All that was made and freed since the last one."""
        ledger = self.ledger
        self.steps.append(Step(phase, name, title, tensors, flops, rank_flops or flops // self.sizes.ranks, remark, sent,
                               ledger.now, ledger.most, ledger.then))
        ledger.restart()


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
    for name in set(program.ledger.alive) - {"output"}:
        program.ledger.free(name)
    program.ledger.restart()
    stack(program)
    if sizes.mlp_backward:
        stack_backward(program)
    return program.steps


def attention(program: Program) -> None:
    """x [n,D] -> output [n,D] of n = N/P tokens, as moe_ext.parallel.sequence and torch's flash kernel do it."""
    s, make, free, step = program.sizes, program.make, program.ledger.free, program.step
    P, n, H, G, d, D = s.ranks, s.mine, s.heads, s.kv, s.head, s.dim
    h, g, letter = s.local_heads, s.local_kv, s.letter
    step("attention", "input", "input and weights", make("input", "N/P, d", n, D), make("Q", "d, d", D, D),
         *(make(name, f"d, {letter} d/h", D, G * d) for name in "KV"), make("O", "d, d", D, D))
    step("attention", "qkv", "q = input x Q, k = input x K, v = input x V", make("q", "N/P, h, d/h", n, H, d),
         *(make(name, f"N/P, {letter}, d/h", n, G, d) for name in "kv"), flops=s.project_flops)

    make("message", s.all_label, P, n, h + 2 * g, d)
    if P > 1:
        make("q_ k_ v_", s.all_label, P, n, h + 2 * g, d)
        free("message")
    else:
        program.ledger.rename("message", "q_ k_ v_")
    step("attention", "exchange", "q_, k_, v_ = all-to-all q, k, v, in one message",
         program.ledger.alive["q_ k_ v_"], sent=s.exchange(h + 2 * g))

    c, lse = make("c", "N, h/P, d/h", s.n, h, d), make("logsumexp", "N, h/P", s.n, h, width=max(4, s.width))
    if not s.backward:
        free("logsumexp")
    step("attention", "attend", "c = softmax(q_ x k_t / sqrt(d/h), causal) x v_", c, lse, flops=s.score_flops,
         remark=f"causal; {amount(4 * s.n ** 2 * D, 'T')}FLOPs if all tokens saw all")

    made = [make("c_", "P, N/P, h/P, d/h", P, n, h, d), make("c_", "N/P, d", n, D)] if P > 1 else []
    free("q", "k", "v")
    if not s.backward:
        free("q_ k_ v_", *["c"] * (P > 1))
    step("attention", "back", "c_ = all-to-all c; transpose(0, 1) & reshape", *made, sent=s.exchange(h))
    output = make("output", "N/P, d", n, D)
    if not s.backward:
        free("c_" if P > 1 else "c")
    step("attention", "output", "output = c_ x O", output, flops=2 * s.n * D ** 2)


def backward(program: Program) -> None:
    """Its gradients, in the order in which autograd makes them and frees what it has kept."""
    s, make, free, step = program.sizes, program.make, program.ledger.free, program.step
    P, n, H, G, d, D = s.ranks, s.mine, s.heads, s.kv, s.head, s.dim
    h, g, letter = s.local_heads, s.local_kv, s.letter
    step("backward", "output", "dO = c_t x doutput, dc_ = doutput x O_t", make("doutput", "N/P, d", n, D),
         make("dO", "d, d", D, D), make("dc_", "N/P, d", n, D), flops=4 * s.n * D ** 2)
    if P > 1:
        free("c_")
        make("message", "P, N/P, h/P, d/h", P, n, h, d)
        make("dc", "N, h/P, d/h", s.n, h, d)
        free("message", "dc_")
    else:
        program.ledger.rename("dc_", "dc")
    step("backward", "back", "dc = all-to-all dc_", program.ledger.alive["dc"], sent=s.exchange(h))

    each = [make(f"d{name}_", f"N, {one}/P, d/h", s.n, heads, d) for name, one, heads in
            (("q", "h", h), ("k", letter, g), ("v", letter, g))]
    free("dc", "q_ k_ v_", "c", "logsumexp")
    step("backward", "attend", "dq_, dk_, dv_ of it, the scores made again", *each, flops=5 * s.score_flops // 2,
         remark="causal")

    make("message", s.all_label, P, n, h + 2 * g, d)
    free("dq_", "dk_", "dv_")
    if P > 1:
        make("dq dk dv", s.all_label, P, n, h + 2 * g, d)
        free("message")
    else:
        program.ledger.rename("message", "dq dk dv")
    step("backward", "exchange", "dq, dk, dv = all-to-all dq_, dk_, dv_, in one message",
         program.ledger.alive["dq dk dv"], sent=s.exchange(h + 2 * g))

    own = []        # gradients that are no view of the message: of several heads, or a sum over ranks with the same
    for name, heads, local in (("dq", H, h), ("dk", G, g), ("dv", G, g)):
        if P > 1 and (local > 1 or heads < P):
            make(name, "h, N/P, d/h", heads, n, d)
            own.append(name)
    if len(own) == 3:
        free("dq dk dv")
    weights, before = [], None
    for name, heads in (("dv", G), ("dk", G), ("dq", H)):
        if P > 1:
            make("turned", f"N/P, {letter}, d/h", n, heads, d)
            if name in own:
                free(name)
        if "dq dk dv" in program.ledger.alive and (name == "dq" or (name == "dk" and "dq" in own)) and P > 1:
            free("dq dk dv")
        weights.append(make(f"d{name[1].upper()}", f"d, {letter} d/h", D, heads * d))
        make("dinput" if before is None else "another", "N/P, d", n, D)
        if P > 1:
            free("turned")
        if before is not None:
            make("dinput", "N/P, d", n, D)
            free("another")
        before = name
    if P == 1:
        free("dq dk dv")
    step("backward", "qkv", "dV, dK, dQ = input_t x dv, dk, dq; dinput = dv x V_t + dk x K_t + dq x Q_t", *weights,
         program.ledger.alive["dinput"], flops=2 * s.project_flops)


def stack(program: Program) -> None:
    """MLPs as moe_ext.parallel.mlp does them, of N/DP tokens on each rank."""
    s, make, free, rename, alive = program.sizes, program.make, program.ledger.free, program.ledger.rename, {}
    tp, D, f, T, reduced = s.tp, s.dim, s.hidden // s.tp, s.n // s.dp, s.mlp == "all-reduce"
    made = [make("input_", "N/DP, d", T, D)] if reduced and tp > 1 else []
    made += [make("W1", "L, d, d'/TP", s.layers, D, f), make("W2", "L, d'/TP, d", s.layers, f, D)]
    program.step("MLP", "input", "input_ = all-gather output; weights" if len(made) > 2 else "weights", *made,
                 sent=s.shared("all-gather", 1) if len(made) > 2 else None)
    parts = Parts(program, "MLP")
    for layer in range(s.layers):
        kept = f" {layer}" if s.mlp_backward else ""
        if not reduced and tp > 1:
            parts.end("gather", make("x" + kept, "N/DP, d", T, D))
        parts.end("inter", make("inter" + kept, "N/DP, d'/TP", T, f))
        parts.end("activation", make("f(inter)" + kept, "N/DP, d'/TP", T, f))
        y = make("product", "N/DP, d", T, D)
        parts.end("output", y)


UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def amount(size: float, unit: str) -> str:
    """Two decimals in the unit, or in a smaller one of which there are more: (57.6e9, "GB") -> "57.60 GB"; of FLOPs
    the letter alone: (96.64e12, "T") -> "96.64 T"."""
    letters = [letter for letter, each in UNITS.items() if each <= UNITS[unit[0]]]
    letter = next((letter for letter in letters if size >= 0.095 * UNITS[letter]), "")
    return f"{size / UNITS[letter]:.{2 * bool(letter)}f} {letter}{unit[1:]}"
