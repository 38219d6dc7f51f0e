"""Tables spread over ranks, over gloo: P ranks compute what one process computes from the whole table."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import close
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext import ops
from moe_ext.ops.dense import ours
from moe_ext.parallel import vocabulary
from moe_ext.parallel.collectives import gather, reduce_scatter
from moe_ext.parallel.vocabulary import vocabulary_parallel_cross_entropy, vocabulary_parallel_embedding

T, D = 22, 6
WORLDS, VOCABS = [2, 4], [50, 53, 3]  # 3: ranks with one row, and one without any
# ignored positions and ignore_index, chunk
CASES = [
    ((), -100, 1024),
    ((), -100, 5),
    ((0, 3, 20), -100, 7),
    (range(5), -1, 5),
    ((2, 3), 1, 8),
    (range(T), -100, 4),
]


def rows_of(table, world, rank):
    """torch.chunk makes no piece for a rank without rows."""
    return (*table.chunk(world), *[table[:0]] * world)[rank].clone()


def drawn(V, dtype=torch.float64, tokens=T):
    g = torch.Generator().manual_seed(V)
    x, w = (torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in ((tokens, D), (V, D)))
    return x, w, torch.randint(0, V, (tokens,), generator=g)


def one_process(head, x, w, targets, **more):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = head(x, w, targets, **more)
    (0.37 * loss).backward()
    return loss.detach(), x.grad, w.grad


def plain_torch(x, w, targets, *, ignore_index=-100, chunk=None):
    return F.cross_entropy(x @ w.T, targets, ignore_index=ignore_index, reduction="sum")


def spread(head, V, *given, **more):
    """one_process on this rank's rows: for the body of a rank."""
    x, w, targets = given
    w = rows_of(w, dist.get_world_size(), dist.get_rank())
    return one_process(head, x, w, targets, vocab_size=V, group=None, **more)


def joined(ranks):
    """The results of the ranks -> the loss, equal bit for bit on all; dx summed; dw in the order of the rows."""
    losses, dxs, dws = zip(*ranks, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses), f"the ranks' losses differ: {losses}"
    return losses[0], sum(dxs), torch.cat(dws)


def equal(got, want, what):
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    error = (got - want).abs().max() if want.numel() else 0
    assert error <= 1e-13 * max(1, want.abs().max() if want.numel() else 0), f"{what}: {error}"


def check_cross_entropy(world, V, folder):
    given = drawn(V)
    cases = []
    for ignored, ignore_index, chunk in CASES:
        targets = given[2].clone()
        targets[list(ignored)] = ignore_index
        cases.append((targets, dict(ignore_index=ignore_index, chunk=chunk)))

    def body(rank):
        return [spread(vocabulary_parallel_cross_entropy, V, *given[:2], t, **more) for t, more in cases]

    for (targets, more), *ranks in zip(cases, *run_ranks(world, body, folder), strict=True):
        got = joined(ranks)
        for head in (plain_torch, ops.linear_cross_entropy):
            want = one_process(head, *given[:2], targets, **more)
            for g, w, what in zip(got, want, ("loss", "dx", "dw"), strict=True):
                equal(g, w, f"{what}, {more}, beside {head.__name__}")


@pytest.mark.c_core
@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize("world", WORLDS)
def test_cross_entropy(world, V, tmp_path):
    check_cross_entropy(world, V, tmp_path)


@pytest.mark.c_core
def test_one_rank(tmp_path):
    check_cross_entropy(1, 53, tmp_path)


def not_rescaled(join):
    def mutant(*args):
        loss, share = join(*args)
        return loss, torch.ones_like(share)

    return mutant


def only_its_own_loss(join):
    return lambda own, at, owner, group: (own, join(own, at, owner, group)[1])


def first_row_of_even_ranks(rows):
    """V // n rows before each rank, as if the ranks had equally many."""

    def mutant(V, group):
        most, _, v = rows(V, group)
        return most, dist.get_rank(group) * (V // dist.get_world_size(group)), v

    return mutant


def target_on_the_rank_before(rows):
    """For the first row of each rank but the first."""
    return lambda V, group: (rows(V, group)[0] + 1, *rows(V, group)[1:])


MUTANTS = [("_join", not_rescaled), ("_join", only_its_own_loss), ("_rows", first_row_of_even_ranks),
           ("_rows", target_on_the_rank_before)]  # fmt: skip


@pytest.mark.c_core
@pytest.mark.parametrize("name, mutant", MUTANTS, ids=[mutant.__name__ for _, mutant in MUTANTS])
def test_mutants_are_noticed(name, mutant, monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, name, mutant(getattr(vocabulary, name)))
    with pytest.raises(AssertionError, match=r"beside|the ranks' losses differ"):
        check_cross_entropy(2, 53, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, tmp_path):
    V = 53
    given = drawn(V, dtype)
    got = joined(run_ranks(4, lambda rank: spread(vocabulary_parallel_cross_entropy, V, *given, chunk=5), tmp_path))
    plain = one_process(ops.linear_cross_entropy, *given, chunk=5)
    oracle = one_process(plain_torch, given[0].double(), given[1].double(), given[2])
    for g, p, o, what in zip(got, plain, oracle, ("loss", "dx", "dw"), strict=True):
        floor = 4 * torch.finfo(dtype).eps  # a product with the share is one more rounding, a sum of 4 ranks' dx three
        close(g, p, o, what, floor)


def test_autocast(tmp_path):
    """fp32 leaves in a bf16 region: bf16 logits, an fp32 loss, fp32 gradients."""
    V = 53
    given = drawn(V, torch.float32)

    def body(rank):
        with torch.autocast("cpu", torch.bfloat16):
            return spread(vocabulary_parallel_cross_entropy, V, *given)

    got = joined(run_ranks(2, body, tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        want = one_process(ops.linear_cross_entropy, *given)
    for g, w, what in zip(got, want, ("loss", "dx", "dw"), strict=True):
        assert g.dtype == w.dtype == torch.float32
        assert (g - w).abs().max() <= 0.02 * w.abs().max(), what
    rounded = one_process(ops.linear_cross_entropy, given[0].bfloat16(), given[1].bfloat16(), given[2])[0]
    assert (got[0] - rounded).abs() <= 1e-6 * rounded, "bf16 is what the region asked for"


@pytest.mark.c_core
def test_large_logits_cost_the_loss_no_digits(tmp_path):
    """Logits near 1e4 and a loss of 5e-4 or 20: a logsumexp in fp32 would be 1e-3 off."""
    x = torch.tensor([[1e4, 1.0]])
    w = torch.tensor([[1.0, 0.0], [1.0, -9.0], [1.0, -8.0], [1.0, -20.0]])

    def body(rank):
        return [spread(vocabulary_parallel_cross_entropy, 4, x, w, torch.tensor([t]))[0] for t in (0, 3)]

    for got, t in zip(run_ranks(2, body, tmp_path)[0], (0, 3), strict=True):
        want = plain_torch(x.double(), w.double(), torch.tensor([t]))
        assert (got - want).abs() <= 1e-7 * want.clamp(min=1), f"{got} {want}"


@pytest.mark.parametrize("V", [8, 3])
def test_no_tokens(V, tmp_path):
    given = drawn(V, torch.float32, tokens=0)
    loss, dx, dw = joined(run_ranks(4, lambda rank: spread(vocabulary_parallel_cross_entropy, V, *given), tmp_path))
    assert loss == 0 and dx.shape == (0, D) and torch.equal(dw, torch.zeros(V, D))


def test_an_ignored_token_may_hold_nan(tmp_path):
    x, w, targets = drawn(9, torch.float32)
    targets[4], x[4] = -100, torch.nan
    got = joined(run_ranks(2, lambda rank: spread(vocabulary_parallel_cross_entropy, 9, x, w, targets), tmp_path))
    want = one_process(ops.linear_cross_entropy, x, w, targets)
    for g, w, what in zip(got[:2], want[:2], ("loss", "dx"), strict=True):
        assert (g - w).abs().max() <= 1e-5 * w.abs().max(), what


def test_only_one_gradient_wanted(tmp_path):
    V = 53
    x, w, targets = drawn(V, torch.float32)

    def body(rank):
        mine = rows_of(w, 2, rank)
        both = spread(vocabulary_parallel_cross_entropy, V, x, w, targets)[1:]
        for i in range(2):
            leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, mine))]
            loss = vocabulary_parallel_cross_entropy(*leaves, targets, vocab_size=V, group=None)
            (alone,) = torch.autograd.grad(0.37 * loss, [leaves[i]])
            assert torch.equal(alone, both[i])
        with torch.no_grad():
            loss = vocabulary_parallel_cross_entropy(*leaves, targets, vocab_size=V, group=None)
        assert not loss.requires_grad

    run_ranks(2, body, tmp_path)


class Allocated(TorchDispatchMode):
    """The storages, by address, of what operators return with at least `least` elements, and the most elements."""

    def __init__(self, least):
        super().__init__()
        self.least, self.storages, self.most = least, {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept: no address comes twice
                self.most = max(self.most, t.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_chunk_of_this_ranks_logits_and_one_message_for_each(dtype, tmp_path):
    V, tokens, chunk, world = 2001, 64, 16, 2
    x, w, targets = drawn(V, dtype, tokens)
    assert chunk * (V // world) > V * D, "logits are the largest tensor"

    def body(rank):
        with Allocated(least=chunk * (V // world) // 2) as allocated:
            spread(vocabulary_parallel_cross_entropy, V, x, w, targets, chunk=chunk)
        calls = 0

        def counting(*args):
            nonlocal calls
            calls += 1
            return gather_rows(*args)

        gather_rows, vocabulary.gather_rows = vocabulary.gather_rows, counting
        spread(vocabulary_parallel_cross_entropy, V, x, w, targets, chunk=chunk)
        return allocated.most, len(allocated.storages), calls

    for rank, (most, storages, calls) in enumerate(run_ranks(world, body, tmp_path)):
        assert most == chunk * rows_of(w, world, rank).shape[0]
        assert storages == 1 or ours(x.device, dtype, chunk), "dlogits take the place of the logits"
        assert calls == tokens // chunk


ERRORS = {
    r"w has dtype torch.float32, wanted that of x": dict(w=lambda w: w.float()),
    r"w has shape \[9, 6\], wanted \[v=10, D=6\], this rank's rows of 20": dict(w=lambda w: w[1:]),
    r"targets has shape \[21\], wanted \[T=22\]": dict(targets=lambda t: t[1:]),
    r"targets has dtype torch.int32, wanted torch.int64": dict(targets=lambda t: t.int()),
    r"chunk is 0, wanted >= 1 token": dict(chunk=0),
    r"targets has 20 at position 3, wanted 0 <= id < 20 or -100": dict(targets=lambda t: t.index_fill(0, index(3), 20)),
    r"targets has -1 at position 0, wanted 0 <= id < 20 or 7": dict(targets=lambda t: t * 0 - 1, ignore_index=7),
}


def index(i):
    return torch.tensor([i])


def test_errors(tmp_path):
    """On every rank alike, so that none waits for the others."""
    x, w, targets = drawn(20)

    def body(rank):
        for message, wrong in ERRORS.items():
            make_w, make_targets = (wrong.get(name, lambda t: t) for name in ("w", "targets"))
            more = {name: value for name, value in wrong.items() if name in ("chunk", "ignore_index")}
            with pytest.raises(RuntimeError, match=f"vocabulary_parallel_cross_entropy: {message}"):
                vocabulary_parallel_cross_entropy(x, make_w(rows_of(w, 2, rank)), make_targets(targets), vocab_size=20,
                                                  group=None, **more)  # fmt: skip
        with pytest.raises(RuntimeError, match=r"embedding: w has shape \[20, 6\], wanted \[v=10, D\]"):
            vocabulary_parallel_embedding(targets, w, vocab_size=20, group=None)

    run_ranks(2, body, tmp_path)


@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize("world", WORLDS)
def test_embedding(world, V, tmp_path):
    """The lookup of the whole table, as it is between tables and blocks: summed and scattered along the sequence."""
    B, S = 3, 2 * world
    tokens, w = torch.randint(0, V, (B, S)), torch.randn(V, D, dtype=torch.float64)
    dy = torch.randn(B, S, D, dtype=torch.float64)

    def body(rank):
        mine = rows_of(w, world, rank).requires_grad_()
        part = vocabulary_parallel_embedding(tokens, mine, vocab_size=V, group=None)
        y = reduce_scatter(part, 1, None)
        y.backward(dy.chunk(world, 1)[rank])
        return part.detach(), y.detach(), mine.grad

    parts, ys, dws = zip(*run_ranks(world, body, tmp_path), strict=True)
    want = F.embedding(tokens, w.requires_grad_())
    want.backward(dy)
    for y in (sum(parts), torch.cat(ys, 1)):
        assert torch.equal(y, want.detach())
    equal(torch.cat(dws), w.grad, "dw")
    assert sum(part.ne(0).any(-1).int() for part in parts).eq(1).all(), "a token has one rank"


@pytest.mark.parametrize("token", [-1, 3, 7])
def test_embedding_refuses_bad_tokens(token, tmp_path):
    """Also on the rank without rows."""

    def body(rank):
        with pytest.raises(IndexError, match="out of range"):
            vocabulary_parallel_embedding(torch.tensor([0, token]), rows_of(torch.ones(3, D), 4, rank), vocab_size=3,
                                          group=None)  # fmt: skip

    run_ranks(4, body, tmp_path)


@pytest.mark.c_core
def test_tied_tables_with_a_sequence_per_rank(tmp_path):
    """tokens -> embedding -> reduce_scatter -> gather -> head, one table: its gradient is that of one process."""
    V, world, B, S = 53, 4, 2, 8
    tokens, w = torch.randint(0, V, (B, S + 1)), torch.randn(V, D, dtype=torch.float64)

    def body(rank):
        mine = rows_of(w, world, rank).requires_grad_()
        x = reduce_scatter(vocabulary_parallel_embedding(tokens[:, :-1], mine, vocab_size=V, group=None), 1, None)
        x = gather(x.sin(), 1, None).flatten(0, 1)
        loss = vocabulary_parallel_cross_entropy(x, mine, tokens[:, 1:].flatten(), vocab_size=V, group=None, chunk=7)
        loss.backward()
        return loss.detach(), mine.grad

    losses, dws = zip(*run_ranks(world, body, tmp_path), strict=True)
    x = F.embedding(tokens[:, :-1], w.requires_grad_()).sin().flatten(0, 1)
    want = plain_torch(x, w, tokens[:, 1:].flatten())
    want.backward()
    equal(losses[0], want.detach(), "loss")
    equal(torch.cat(dws), w.grad, "dw")
