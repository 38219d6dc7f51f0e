"""Ranks that share sequences attend as one process does: both forms against a literal softmax, values, gradients."""
import functools
import itertools
import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from test_attention import Largest, literal_attention, literal_seen
from torch.utils.checkpoint import checkpoint

from moe_ext import attention
from moe_ext.attention import Documents, attend, visible
from moe_ext.config import ModelConfig
from moe_ext.model import GPT, KVCache
from moe_ext.parallel.sequence import AllGather, Ulysses

pytestmark = pytest.mark.c_core
FORMS = [Ulysses, AllGather]
S, H, D = 24, 8, 4
ROWS = {
    "whole": lambda B: (None, None),
    "documents": lambda B: (torch.randint(5, (B, S)).sort().values, None),         # they cross the ranks' borders
    "mixed": lambda B: (torch.randint(3, (B, S)), None),
    "pads": lambda B: (torch.zeros(B, S, dtype=torch.long), torch.rand(B, S) < 0.7),
    "both": lambda B: (torch.randint(3, (B, S)).sort().values, torch.rand(B, S) < 0.7),
}
# window, rows, sinks, key/value heads, sequences; a part of all
CASES = list(itertools.product([0, 2, 5, 13], ROWS, [False, True], [8, 2, 1], [1, 3]))
random.Random(0).shuffle(CASES)
CASES = CASES[:36]


class Text:
    """q, k, v, sinks, what is seen, what comes back; drawn in fp64."""

    def __init__(self, window=0, rows="whole", sinks=False, G=8, B=1, seed=0):
        torch.manual_seed(seed)
        self.window, (self.documents, self.real) = window, ROWS[rows](B)
        self.inputs = [torch.randn(B, n, S, D, dtype=torch.float64) for n in (H, G, G)]
        self.sinks = torch.randn(H, dtype=torch.float64) if sinks else None
        self.dy = torch.randn(B, H, S, D, dtype=torch.float64)
        if self.real is not None:
            self.dy *= self.real[:, None, :, None]

    def seen(self):
        def mask(size):
            seen = visible(size, 0, self.window)
            return F.pad(seen, (1, 0), value=True) if self.sinks is not None else seen

        if self.documents is not None:
            documents = Documents.of(self.documents, self.real)
            longest = int(documents.sizes.max())
            return documents.but(mask=mask(longest) if 0 < self.window < longest else None)
        return mask(S) if self.window else None

    def results(self, call, dtype=torch.float64, cut=lambda x: x):
        """[y, dq, dk, dv, dsinks] of call(q, k, v, sinks); y is that of real tokens alone."""
        inputs = [cut(x).to(dtype).requires_grad_() for x in self.inputs]
        sinks = [] if self.sinks is None else [self.sinks.to(dtype).requires_grad_()]
        y = call(*inputs, *sinks)
        grads = torch.autograd.grad(y, [*inputs, *sinks], cut(self.dy).to(dtype))
        return [y.detach() * (cut(self.dy) != 0), *grads]

    def literal(self):
        seen = literal_seen(S, self.window, self.documents, self.real)
        return self.results(lambda q, k, v, sinks=None: literal_attention(q, k, v, seen, sinks))

    def on(self, across, dtype=torch.float64, core=attend):
        """The same of this rank's tokens; the sinks' gradient is this rank's part of it."""
        return self.results(lambda q, k, v, sinks=None: across(core, q, k, v, self.seen(), sinks), dtype,
                            lambda x: x.chunk(across.ranks, dim=2)[across.rank])


def joined(ranks):
    """Results of each rank -> of all: tokens behind one another, sinks summed."""
    return [torch.cat(parts, dim=2) if parts[0].ndim == 4 else sum(parts) for parts in zip(*ranks, strict=True)]


def errors(got, want):
    return [(g.double() - w).abs().max().item() for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_both_forms_are_one_process(world, tmp_path):
    texts = [Text(*case, seed=i) for i, case in enumerate(CASES)]
    again = functools.partial(checkpoint, attend, use_reentrant=False)
    each = run_ranks(world, lambda rank: [[text.on(form(), core=core) for form in FORMS]
                                          for text, core in zip(texts, itertools.cycle([attend, again]))], tmp_path)
    for i, (text, case) in enumerate(zip(texts, CASES, strict=True)):
        want = text.literal()
        for f, form in enumerate(FORMS):
            wrong = errors(joined([rank[i][f] for rank in each]), want)
            assert max(e / w.abs().max() for e, w in zip(wrong, want, strict=True)) < 1e-12, (form, case, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_one_process(dtype, tmp_path):
    """At most twice the largest error of one process of the same dtype."""
    texts = [Text(0, "documents", True, 2, 3), Text(5, "both", False, 1, 3), Text(0, "whole", False, 8, 3),
             Text(0, "whole", True, 8, 3)]
    each = run_ranks(4, lambda rank: [[text.on(form(), dtype) for form in FORMS] for text in texts], tmp_path)
    for i, text in enumerate(texts):
        want = text.literal()
        one = text.results(lambda q, k, v, sinks=None, text=text: attend(q, k, v, text.seen(), sinks), dtype)
        for f in range(2):
            got = errors(joined([rank[i][f] for rank in each]), want)
            for e, most in zip(got, errors(one, want), strict=True):
                assert e <= 2 * most, (FORMS[f], text.window, got, errors(one, want))


def test_autocast_makes_the_same_dtype_on_every_rank(tmp_path):
    """Also of what RoPE in fp32 has made fp32."""
    def body(rank):
        q, k, v = (torch.randn(1, n, 6, D) for n in (H, 2, 2))
        with torch.autocast("cpu", torch.bfloat16):
            return [str(form()(attend, q, k, v.bfloat16()).dtype) for form in FORMS]

    assert run_ranks(2, body, tmp_path) == [["torch.bfloat16"] * 2] * 2


def test_of_pads_alone_all_have_a_gradient():
    """Zeros, and not none: other ranks wait for them."""
    q, k, v, sinks = (torch.ones(shape, requires_grad=True) for shape in ((1, H, 6, D), (1, 2, 6, D), (1, 2, 6, D), H))
    documents = Documents.of(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.bool))
    for gradient in torch.autograd.grad(attend(q, k, v, documents, sinks).sum(), (q, k, v, sinks)):
        assert gradient.count_nonzero() == 0


def test_a_second_derivative_is_refused():
    """By q, k and v too, when the gradient that comes in is a constant."""
    q, k, v = (torch.randn(1, 2, n, D, requires_grad=True) for n in (3, 6, 6))
    dq, = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


def test_a_query_sees_just_what_it_may(tmp_path):
    """Every pair of tokens of two rows of documents, by the gradient: of query i to key j it is there if i sees j."""
    cases = [Text(window, rows, sinks, 4, 2, seed=1) for window, rows, sinks in
             [(0, "whole", False), (7, "whole", True), (0, "documents", True), (4, "mixed", False), (3, "both", False)]]

    def body(rank):
        found = []
        for text in cases:
            for form in FORMS:
                across = form()
                q, k, v = (across.mine(x.movedim(2, -1)).movedim(-1, 2).requires_grad_() for x in text.inputs)
                y, n = across(attend, q, k, v, text.seen(), text.sinks), S // across.ranks
                pairs = []
                for i in range(S):
                    dy = torch.zeros_like(y)
                    dy[:, :, i % n] = i // n == rank
                    dv, = torch.autograd.grad(y, v, dy, retain_graph=True)
                    pairs.append(dv.abs().amax((1, 3)))
                found.append(torch.stack(pairs, dim=1))
        return found

    each = run_ranks(4, body, tmp_path)
    for i, text in enumerate(cases):
        seen = literal_seen(S, text.window, text.documents, text.real)[:, 0]
        if text.real is not None:
            seen = seen & text.real[:, :, None]         # of pads no one asks
        assert all(seen[:, b:, :b].any() for b in range(S // 4, S, S // 4))     # over every border
        for f in range(2):
            assert torch.equal(torch.cat([rank[2 * i + f] for rank in each], dim=2) > 0, seen.expand(2, S, S)), (i, f)


def test_a_needle_of_the_first_rank_is_found_on_the_last(tmp_path):
    text = Text()
    q, k, v = text.inputs
    q[:, :, -1] = 100 * F.normalize(k[:, :, 2], dim=-1)
    k[:, :, 2] = 10 * F.normalize(k[:, :, 2], dim=-1)

    def body(rank):
        return [form()(attend, *(x.chunk(4, 2)[rank] for x in text.inputs)) for form in FORMS]

    for y in run_ranks(4, body, tmp_path)[-1]:
        assert torch.allclose(y[:, :, -1], v[:, :, 2]) and not torch.allclose(y[:, :, -2], v[:, :, 2])


@pytest.mark.parametrize("world", [2, 8])
def test_bytes(world, tmp_path):
    """What a rank sends to others in a forward, and again in the backward."""
    def body(rank):
        sent, results = [0], []
        exchange = dist.all_to_all_single

        def counted(received, x, **options):
            sent[0] += x.nbytes * (world - 1) // world
            return exchange(received, x, **options)

        dist.all_to_all_single = counted
        for B, G in itertools.product([1, 3], [8, 4, 2, 1]):
            for form in FORMS:
                q, k, v = (torch.ones(B, n, 5, D, requires_grad=True) for n in (H, G, G))
                sent[0] = 0
                y = form()(attend, q, k, v)
                there, sent[0] = sent[0], 0
                y.sum().backward()
                results.append((form.__name__, B, G, there, sent[0]))
        return results

    for name, B, G, there, back in itertools.chain(*run_ranks(world, body, tmp_path)):
        of_ulysses = B * 5 * D * (2 * H + 2 * max(G, world)) * (world - 1) // world * 4
        of_gather = 2 * B * 5 * D * G * (world - 1) * 4     # forward by an all-gather, backward by an all-to-all
        assert (there, back) == ((of_ulysses, of_ulysses) if name == "Ulysses" else (0, of_gather)), (name, B, G)


def test_no_scores_are_kept(tmp_path):
    """Nothing of n * S elements, forward or backward, in either form, of a whole text or of documents."""
    N = 2048

    def body(rank):
        sizes = []
        for form, seen in itertools.product(FORMS, [None, Documents.of((torch.arange(N) // 900)[None])]):
            q, k, v = (torch.randn(1, 2, N // 2, D, requires_grad=True) for _ in range(3))
            with Largest() as largest:
                form()(attend, q, k, v, seen, torch.zeros(2)).sum().backward()
            sizes.append(largest.elements)
        return sizes

    for sizes in run_ranks(2, body, tmp_path):
        assert all(0 < elements <= 2 * 2 * (N + 300) * (D + 8) < N // 2 * N // 4 for elements in sizes), sizes


def test_errors(tmp_path):
    def tensors(H=8, G=8, n=6, B=1, d=D):
        return torch.ones(B, H, n, d), torch.ones(B, G, n, d), torch.ones(B, G, n, d)

    q, k, v = tensors()
    documents = Documents.of(torch.arange(6)[None] // 3)
    wrong = [
        (FORMS, (q, k, v[:, :, :3]), r"v \[1, 8, 3, 4\] torch.float32; wanted q \[B,H,n,d\]"),
        (FORMS, (q, k, v.double()), "of one dtype"),
        (FORMS, (q[:, :, :3], k, v), "this rank's n tokens of each sequence"),
        (FORMS, tensors(8, 3), "H a multiple of"),
        (FORMS, (q, k, v, documents), r"`seen` is Documents over \[1, 6\], wanted \[1, 24\]: .* 6 on each of 4"),
        (FORMS, (q, k, v, visible(6)), r"`seen` is Tensor over \[1, 6, 6\], wanted \[1, 24, 24\]"),
        (FORMS, (q, k, v, visible(6, 0, 2)), r"over \[3\], wanted \[12\]"),
        (FORMS, (q, k, v, None, torch.ones(2)), r"got sinks \[2\], wanted \[8\], those of all heads"),
        ([Ulysses], tensors(6, 6), "4 ranks cannot share 6 query and 6 key/value heads: .*: take 1, 2, 3, 6, or AllG"),
        ([Ulysses], tensors(12, 6), "take 1, 2, 3, 6, 12, or AllGather"),
        ([Ulysses], tensors(2, 2), r"4 ranks cannot share 2 .*: take 1, 2, or AllGather \(mesh.attention gather\)"),
    ]

    def body(rank):
        for forms, args, words in wrong:
            for form in forms:
                with pytest.raises(ValueError, match=f"{form.__name__}: .*{words}"):
                    form()(attend, *args)
        for form in FORMS:
            with pytest.raises(ValueError, match=f"{form.__name__}: got sequences of 10 tokens, .* 4 ranks .*: cut "
                                                 "them to 8, or fill them up to 12 with pads"):
                form().mine(torch.zeros(2, 10))
        AllGather()(attend, *tensors(6, 3))
        model = GPT(ModelConfig(vocab_size=61, seq_len=12, layers=2, dim=16, heads=4))
        for block in model.layers:
            block.self_attn.across = Ulysses()
        with pytest.raises(ValueError, match="got a cache, but ranks share this model's sequences"):
            model.logits(torch.zeros(1, 4, dtype=torch.long), KVCache(model.config))

    run_ranks(4, body, tmp_path)


class _Share(torch.autograd.Function):
    """A gradient divided by the ranks that it comes from, as if one of them alone counted."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx / ctx.ranks, None


def heads_in_turn(across, core, q, k, v, *rest):
    """Head h goes to rank h % P."""
    order = torch.arange(H).view(-1, across.ranks).t().flatten()
    return Ulysses()(core, q[:, order], k, v, *rest)[:, order.argsort()]


def replicas_not_summed(across, core, q, k, v, *rest):
    return Ulysses()(core, q, *(_Share.apply(t, across.ranks // t.shape[1]) for t in (k, v)), *rest)


def rank_0_everywhere(across, core, q, k, v, *rest):
    form = AllGather()
    form.rank = 0
    return form(core, q, k, v, *rest)


def unmerged(across, core, *args):
    """The gradients of earlier keys by the own keys' sum of exponentials."""
    attention.torch = type("Torch", (), {"__getattr__": lambda _, name: getattr(torch, name),
                                   "logaddexp": staticmethod(lambda a, b: b)})()
    try:
        return AllGather()(core, *args)
    finally:
        attention.torch = torch


@pytest.mark.parametrize("mutant", [heads_in_turn, replicas_not_summed, rank_0_everywhere, unmerged])
def test_a_wrong_exchange_is_found(mutant, tmp_path):
    text = Text(0, "whole", False, 2, 1)

    def body(rank):
        across = functools.partial(mutant, Ulysses())
        across.ranks, across.rank = 4, rank
        return text.on(across)

    assert max(errors(joined(run_ranks(4, body, tmp_path)), text.literal())) > 1e-3


def test_of_one_rank_nothing_is_exchanged(tmp_path):
    text = Text(5, "both", True, 2, 3)
    got, = run_ranks(1, lambda rank: [text.on(form()) for form in FORMS], tmp_path)
    for results in got:
        assert math.isclose(0, max(errors(results, text.literal())), abs_tol=1e-12)
