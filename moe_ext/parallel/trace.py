"""A debug trace of the token exchange (log.trace_exchange): per layer and rank, what goes where, in the order in which
it happens; and the invariants, counted once more from the ids, of which a violation ends the run:

    sent       to each rank, the tokens with an expert there, once each: T <= sum <= min(K, P) * T
    received   = column of this rank in the matrix of what all ranks send (receive counts = its transpose)
    processed  = received, and as many copies as ids say
    back       = sent
It costs an exchange of counts and a host read more per layer.
"""
import sys

import torch


class TracedExchange:
    """An ExpertExchange that says what it does. layer: its name in the lines."""

    def __init__(self, exchange, layer: str):
        self.exchange, self.layer = exchange, layer
        self.rank, self.ranks = exchange.transport.rank, exchange.transport.ranks

    def say(self, text: str) -> None:
        sys.stdout.write(f"[DEBUG] Rank {self.rank}: {self.layer}: {text}\n")     # one write: ranks share the console
        sys.stdout.flush()

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise RuntimeError(f"token exchange of {self.layer} on rank {self.rank}: {sentence}")

    def dispatch(self, x_TD, weights_TK, ids_TK):
        T, K = ids_TK.shape
        self.say(f"gate assignments complete, top_k_ids shape: {[T, K]}, tokens {list(x_TD.shape)}")
        owners_TK = ids_TK.long().div(self.exchange.num_experts // self.ranks, rounding_mode="floor")
        sends_P = torch.stack([(owners_TK == rank).any(1).sum(dtype=torch.int32) for rank in range(self.ranks)])
        sends_PP = self.exchange.transport.counts(sends_P[:, None])[..., 0].long()
        sent, received = sends_PP[self.rank], sends_PP[:, self.rank]
        for rank, rows in enumerate(sent.tolist()):
            self.say(f"sending {rows} tokens to rank {rank}")
        kept = int((ids_TK >= 0).any(1).sum())
        self.require(kept <= int(sent.sum()) <= min(K, self.ranks) * T, f"{int(sent.sum())} rows leave for {T} tokens")

        result = self.exchange.dispatch(x_TD, weights_TK, ids_TK)
        x_RD, _, ids_RK, num_copies, trip = result
        self.require(torch.equal(trip.rows_PP, sends_PP), f"the plan's counts {trip.rows_PP.tolist()} are not those of "
                     f"the ids, {sends_PP.tolist()}")
        self.say(f"recv_counts: {received.tolist()}, N_recv: {int(received.sum())}")
        self.require(len(x_RD) == int(received.sum()), f"{len(x_RD)} rows came, {int(received.sum())} were sent")
        self.require(int((ids_RK >= 0).sum()) == num_copies, f"{num_copies} copies were announced, the ids say "
                     f"{int((ids_RK >= 0).sum())}")
        self.say(f"token communication complete, received {len(x_RD)} tokens")
        return result

    def combine(self, y_RD, trip):
        expected = int(trip.rows_PP[:, self.rank].sum())
        self.say(f"expected to process {expected} tokens, actually processed {len(y_RD)}")
        self.require(len(y_RD) == expected, f"{len(y_RD)} rows were processed, {expected} had come")
        for rank, rows in enumerate(trip.rows_PP[:, self.rank].tolist()):
            self.say(f"sending {rows} processed tokens back to rank {rank}")
        y_TD = self.exchange.combine(y_RD, trip)
        self.say(f"received {trip.sent} results for {trip.sent} rows sent, {len(y_TD)} tokens")
        return y_TD
