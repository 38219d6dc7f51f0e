"""Rows between ranks, three ways behind one interface.

    TorchTransport    torch.distributed's all_to_all_single: gloo, NCCL, any device. The default.
    NcclTransport     NCCL called from C on a communicator of its own, on the current stream. CUDA.
    WindowTransport   rows written straight into the receiver's memory. The ranks of one host: on CPUs through shared
                      memory, on GPUs through CUDA IPC.

A transport has `ranks`, `rank`, and for rows of any kind

    counts(mine) -> all        mine: int32 [ranks, n] on the device, what this rank has for each; all: int32 [ranks,
                               ranks, n] on the CPU, all[p][q] what p has for q. The one host read of an exchange.
    rows(sent, rows_PP) -> received     sent [S, W]: this rank's rows, in the order of their receivers; rows_PP: int
                               [ranks, ranks] on the CPU, from p to q. received: in the order of their senders.

and for the rows of tokens, with a `trip` of moe_ext.parallel.experts, which knows the plan and the rows_PP of dispatch,

    forth(trip, x_TD, weights_TK=None) -> x_RD, ids_RK, weights_RK      a token's row, once to each rank of its experts;
                               with weights it takes its ids along. ids_RK: int32, local, -1 elsewhere
    back(trip, y_RD, weights_RK=None) -> y_TD, weights_TK       the rows of forth return, and a token gets the sum of
                               its rows, in rank order; the weights of each of its experts return to their places

which are pack, rows and unpack or combine (moe_ext.ops.exchange), with the same bits on every transport. On CPUs
windows pack straight into the receiver's memory, and unpack or combine straight from there. Without weights only x_RD
or y_TD means something.

All ranks make the same calls in the same order, with the same rows_PP. The way back is rows(.., rows_PP.T). Rows are
moved as bytes. Nothing here is differentiable; moe_ext.parallel.experts is.

A rank that does not answer within the timeout ends the others with a RuntimeError; the transport is broken then, and
says so again at the next call. Windows on CPUs need not wait for the timeout if the rank has died, and say that.
Launch order: collectives of another communicator beside an NcclTransport belong on the same stream, or in the same
order on all ranks; the kernels of a WindowTransport on GPUs wait on the device in the same way.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from moe_ext import ops
from moe_ext.ops.exchange import message_width

_library = torch.library.Library("moe_wire", "DEF")
for _schema in (
    "nccl_id(Tensor like) -> Tensor",
    "nccl_open(Tensor like, Tensor id, int ranks, int rank, float seconds) -> int",
    "window_open(Tensor like, int ranks, int rank, int bytes, float seconds) -> (int, Tensor, bool)",
    "wire_join(Tensor like, int wire, Tensor handles) -> ()",
    "wire_counts(Tensor mine, int wire, int ranks) -> Tensor",
    "wire_rows(Tensor sent, int wire, int[] bytes, int rows) -> Tensor",
    "wire_forth(Tensor x, Tensor? weights, Tensor ids, Tensor send, int num_experts, int wire, int[] rows) "
    "-> (Tensor, Tensor, Tensor)",
    "wire_back(Tensor y, Tensor? weights, Tensor ids, Tensor place, int num_experts, int wire, int[] rows) "
    "-> (Tensor, Tensor)",
    "wire_leave(Tensor like, int wire) -> ()",
    "wire_close(Tensor like, int wire) -> ()",
):
    _library.define(_schema)
_wire = torch.ops.moe_wire


class Transport:
    """forth and back, made of `rows`."""

    def forth(self, trip, x_TD, weights_TK=None):
        ids_TK = None if weights_TK is None else trip.ids_TK
        message = ops.exchange_pack(x_TD, ids_TK, weights_TK, trip.plan.send_M, trip.num_experts, self.ranks, trip.sent)
        message = self.rows(message, trip.rows_PP)
        if weights_TK is None:
            return message, None, None
        return ops.exchange_unpack(message, x_TD.shape[1], weights_TK.shape[1], weights_TK.dtype)

    def back(self, trip, y_RD, weights_RK=None):
        if weights_RK is None:
            return ops.exchange_combine(self.rows(y_RD, trip.rows_PP.T), trip.plan.place_TP), None
        message = ops.exchange_pack(y_RD, None, weights_RK, None, trip.num_experts, self.ranks, len(y_RD))
        return ops.exchange_combine(self.rows(message, trip.rows_PP.T), trip.plan.place_TP, trip.ids_TK,
                                    trip.num_experts, y_RD.shape[1], weights_RK.dtype)  # fmt: skip


class TorchTransport(Transport):
    """`group`: a process group, None for all ranks. timeout: a timedelta that ends a wait for a dead peer; on CUDA that
    of counts alone, for the host does not wait in rows. None: the group's own does."""

    def __init__(self, group=None, timeout=None):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.timeout = timeout

    def counts(self, mine):
        all_PPn = mine.new_empty(self.ranks, *mine.shape)
        self._run(self.timeout, dist.all_gather, list(all_PPn), mine.contiguous())
        return all_PPn.cpu()

    def rows(self, sent, rows_PP):
        send, receive = rows_PP[self.rank].tolist(), rows_PP[:, self.rank].tolist()
        received = sent.new_empty(sum(receive), sent.shape[1])
        timeout = self.timeout if sent.device.type == "cpu" else None
        self._run(timeout, dist.all_to_all_single, _bytes(received), _bytes(sent), receive, send)
        return received

    def _run(self, timeout, collective, *args):
        if timeout is None:
            collective(*args, group=self.group)
        else:
            collective(*args, group=self.group, async_op=True).wait(timeout)


def _bytes(x):
    # contiguous() leaves odd strides where a size is 0 or 1; bytes need ordinary ones.
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1)).view(torch.uint8)


class _Wire(Transport):
    """A wire of libmoe_cuda.so or of the C core. `store`: a torch.distributed store that the ranks share, for the
    meeting alone; each transport needs a `name` of its own in it. seconds: how long a rank may keep the others
    waiting."""

    def __init__(self, store, ranks, rank, *, device="cuda", seconds=60.0, name="moe"):
        self.store, self.ranks, self.rank, self.seconds = dist.PrefixStore(name, store), ranks, rank, seconds
        self.like, self.wire, self.meetings = torch.empty(0, device=device), None, 0

    def counts(self, mine):
        self._check(mine)
        all_PPn = _wire.wire_counts(mine.contiguous().view(-1), self.wire, self.ranks)
        return all_PPn.view(self.ranks, *mine.shape)

    def rows(self, sent, rows_PP):
        self._check(sent)
        send, receive = int(rows_PP[self.rank].sum()), int(rows_PP[:, self.rank].sum())
        if rows_PP.shape != (self.ranks, self.ranks) or send != len(sent):
            raise ValueError(
                f"{type(self).__name__}.rows: rows_PP {list(rows_PP.shape)} sends {send} rows of rank {self.rank}, "
                f"wanted [{self.ranks}, {self.ranks}] and the {len(sent)} rows of sent"
            )
        row = sent.shape[1] * sent.element_size()
        return _wire.wire_rows(sent.contiguous(), self.wire, (rows_PP.long() * row).flatten().tolist(), receive)

    def _check(self, x):
        if self.wire is None:
            raise RuntimeError(f"{type(self).__name__} is closed")
        if x.device != self.like.device:
            raise ValueError(f"{type(self).__name__} moves tensors on {self.like.device}, got one on {x.device}")

    def close(self):
        """Frees what the wire holds. Every rank closes, after its last call."""
        wire, self.wire = self.wire, None
        if wire is not None:
            try:
                _wire.wire_leave(self.like, wire)
                self._meet()
            finally:
                _wire.wire_close(self.like, wire)

    def _meet(self, words=None):
        """What every rank puts on the table, [ranks, n] int64; None: a rank that only takes part."""
        self.meetings += 1
        mine = b"" if words is None else words.numpy().tobytes()
        self.store.set(f"{self.meetings}/{self.rank}", mine)
        every = [self._get(f"{self.meetings}/{p}", p) for p in range(self.ranks)]
        return [torch.frombuffer(bytearray(b), dtype=torch.int64) for b in every if b]

    def _get(self, key, rank):
        try:
            self.store.wait([key], timedelta(seconds=self.seconds))
        except RuntimeError as error:
            raise RuntimeError(
                f"{type(self).__name__}: rank {rank} did not come to the meeting within {self.seconds:g} s"
            ) from error
        return self.store.get(key)


class NcclTransport(_Wire):
    def __init__(self, store, ranks, rank, **more):
        super().__init__(store, ranks, rank, **more)
        id = self._meet(_wire.nccl_id(self.like) if rank == 0 else None)[0]
        self.wire = _wire.nccl_open(self.like, id.view(1, -1), ranks, rank, self.seconds)


class WindowTransport(_Wire):
    """bytes: the room for rows on each rank at first. All ranks see the same counts, so all notice at once that some
    rank's room is too small, and meet again with larger windows."""

    def __init__(self, store, ranks, rank, *, bytes=64 << 20, **more):
        super().__init__(store, ranks, rank, **more)
        self._open(bytes)

    def _open(self, bytes):
        wire, handle, self.straight = _wire.window_open(self.like, self.ranks, self.rank, bytes, self.seconds)
        try:
            _wire.wire_join(self.like, wire, torch.stack(self._meet(handle.flatten())))
        except RuntimeError:
            _wire.wire_close(self.like, wire)
            raise
        self.wire, self.bytes = wire, bytes

    def rows(self, sent, rows_PP):
        self._prepare(sent, sent.shape[1], rows_PP)
        return super().rows(sent, rows_PP)

    def forth(self, trip, x_TD, weights_TK=None):
        if not self.straight:
            return super().forth(trip, x_TD, weights_TK)
        return self._straight(_wire.wire_forth, x_TD, weights_TK, True, trip, trip.plan.send_M, trip.rows_PP)

    def back(self, trip, y_RD, weights_RK=None):
        if not self.straight:
            return super().back(trip, y_RD, weights_RK)
        return self._straight(_wire.wire_back, y_RD, weights_RK, False, trip, trip.plan.place_TP, trip.rows_PP.T)

    def _straight(self, op, x, weights, ids, trip, where, rows_PP):
        """ids: whether they travel with weights."""
        if weights is not None:
            weights = weights.contiguous()
        width = message_width(x.dtype, x.shape[1], trip.ids_TK.shape[1], ids and weights is not None,
                              getattr(weights, "dtype", None))  # fmt: skip
        self._prepare(x, width, rows_PP)
        return op(x.contiguous(), weights, trip.ids_TK, where, trip.num_experts, self.wire, rows_PP.flatten().tolist())

    def _prepare(self, x, width, rows_PP):
        """Checks x, and makes room for rows of `width` elements of its dtype."""
        self._check(x)
        needed = int(rows_PP.sum(0).max()) * width * x.element_size()
        if needed > self.bytes:
            self.close()
            self._open(needed * 5 // 4)
