"""Bytes of live storage, against counts by hand."""
import torch
from ranks import run_ranks

from moe_ext.check.live import Live
from moe_ext.parallel.collectives import all_to_all


def test_views_in_place_and_freed():
    before = torch.zeros(1000)
    with Live() as live:
        a = torch.ones(100)
        assert (live.now, live.most) == (400, 400)
        kept = [a.view(10, 10).t(), before[3:], before.add_(1), a.mul_(2)]      # nothing new
        assert (live.now, live.most) == (400, 400)
        del a, kept
        assert (live.now, live.most) == (0, 400)
        live.restart()
        assert live.most == 0
        b = torch.add(torch.ones(3), 1, out=torch.empty(0))                     # 12 bytes for the ones, gone again
        assert (live.now, live.most) == (12, 24)
        b.resize_(100)
        assert (live.now, live.most) == (400, 400)
    del b
    torch.ones(10**6)
    assert (live.now, live.most) == (400, 400)


def test_what_autograd_saves_and_gradients():
    with Live() as live:
        w = torch.randn(100, requires_grad=True)
        y = w.exp().exp()
        assert live.now == live.most == 3 * 400
        loss = y.sum()
        del y
        assert live.now == 3 * 400 + 4
        loss.backward()                     # the loss's gradient; then one of 400 at a time, as what was saved goes
        assert live.now == 2 * 400 + 4 and live.most == 4 * 400 + 2 * 4
        w.grad = None
        assert live.now == 404


def test_attention_keeps_its_result_and_a_number_for_each_query():
    with Live() as live:
        q = torch.randn(1, 2, 64, 16, requires_grad=True)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        size = 2 * 64 * 16 * 4
        assert live.now == live.most == 2 * size + 2 * 64 * 4
        y.backward(torch.ones_like(y))
        assert live.now == 3 * size


def test_across_ranks(tmp_path):
    """gloo's threads hold what is sent for a moment longer than the call."""

    def body(rank):
        with Live() as live:
            x = torch.randn(2, 50)
            y = all_to_all(x.t().contiguous().t(), None)        # a copy, another to send, one received
            counted = [live.now, live.most]
            y = all_to_all(y, None)
            del x, y
            return [*counted, live.most, live.now]

    assert run_ranks(2, body, tmp_path) == [[800, 1600, 1600, 0]] * 2
