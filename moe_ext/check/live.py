"""Bytes of live storage: what tensors hold, not what a process occupies.

    with Live(device) as live:
        weights = torch.randn(..)
        live.now, live.most         # bytes that tensors made in here hold now, and held at most
        live.restart()              # the most from here on
        loss.backward()
    live.most                       # stays as it was at the end

On CUDA the allocator's own counters, less what they were at the beginning; it rounds blocks up to 512 bytes. On the CPU
each storage counts, once however many views it has, from the return of the op that makes it until it is freed:
gradients and what autograd saves too, but not what a kernel allocates for itself and frees before it returns (a few
blocks per thread in the flash kernel of attention), nor gloo's buffers.
"""
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext import private

private.require("moe_ext.check.live")
SECONDS = 2e-3      # until a thread of gloo's has let go of the tensors of a collective that is over; it needs the GIL


class Live:
    """The storages that are made on `device` between enter and exit. Not to be entered twice."""

    def __init__(self, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._counter = Allocator(device) if device.type == "cuda" else Storages()

    def __enter__(self):
        self._counter.__enter__()
        return self

    def __exit__(self, *error):
        self._counter.__exit__(*error)

    @property
    def now(self) -> int:
        return self._counter.now

    @property
    def most(self) -> int:
        return self._counter.most

    def restart(self) -> None:
        """Begin again to look for the most, at what there is now."""
        self._counter.restart()


class Allocator:
    """CUDA's."""

    def __init__(self, device):
        self.device, self.end = device, None

    def __enter__(self):
        self.before = torch.cuda.memory_allocated(self.device)
        self.restart()

    def __exit__(self, *error):
        self.end = self.now, self.most

    @property
    def now(self):
        return self.end[0] if self.end else torch.cuda.memory_allocated(self.device) - self.before

    @property
    def most(self):
        return self.end[1] if self.end else torch.cuda.max_memory_allocated(self.device) - self.before

    def restart(self):
        torch.cuda.reset_peak_memory_stats(self.device)


class Storages(TorchDispatchMode):
    """Every storage that an op returns and did not get, until its finalizer runs."""

    def __init__(self):
        super().__init__()
        self.bytes, self.watched = {}, {}       # by the storage's address, which another may have once it is freed
        self.sum = self.peak = 0
        self.communicated = False

    def __exit__(self, *error):
        self.settle()
        super().__exit__(*error)
        self.watched.clear()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.settle()
        given = storages((args, kwargs))
        result = op(*args, **kwargs or {})
        for address, storage in (storages(result) | given).items():
            if address in self.bytes:
                self.count(address, storage.nbytes())       # which out= and resize_ change
            elif address not in given:
                self.watched[address] = weakref.ref(storage, lambda _, address=address: self.forget(address))
                self.count(address, storage.nbytes())
        self.communicated = op.namespace == "c10d"
        return result

    def settle(self):
        if self.communicated:
            time.sleep(SECONDS)
            self.communicated = False

    def count(self, address, nbytes):
        self.sum += nbytes - self.bytes.get(address, 0)
        self.bytes[address] = nbytes
        self.peak = max(self.peak, self.sum)

    def forget(self, address):
        self.sum -= self.bytes.pop(address)
        del self.watched[address]

    @property
    def now(self):
        self.settle()
        return self.sum

    @property
    def most(self):
        return self.peak

    def restart(self):
        self.peak = self.now


def storages(tree) -> dict[int, torch.UntypedStorage]:
    found = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
    return {storage._cdata: storage for storage in found}
