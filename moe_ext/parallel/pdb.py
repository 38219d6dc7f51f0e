"""A debugger that ranks share: `from moe_ext.parallel.pdb import set_trace`, then `set_trace()` or `set_trace(rank=1)`.

    > moe_ext/train.py(80)train()
    -> grad_norm = clip_grad_norm(model.named_parameters(), config.optim.clip)
    (rank 1) p loss

Commands are read from file descriptor 0 if it is a terminal, as torchrun leaves it, otherwise from /dev/tty. The ranks
of a host take turns: one has the terminal from its prompt until a command lets it run (n, s, c, ..), then another that
has stopped. So a collective under `n` returns once the other ranks have been told `n` too. A rank that dies lets go.

A rank at its prompt is alive to moe_ext.parallel.failure.Watch, but a collective that waits for it fails after the
timeout of the process group: raise that to debug at leisure. `q` raises bdb.BdbQuit, which ends this rank and so all.
"""

import fcntl
import functools
import os
import pdb
import sys

import torch.distributed as dist


def set_trace(rank: int | None = None) -> None:
    """Stop here, on every rank or on `rank` alone. Errors: OSError if this process has no terminal."""
    here = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if rank in (None, here):
        RankPdb(here).set_trace(sys._getframe(1))


class RankPdb(pdb.Pdb):
    def __init__(self, rank: int):
        self.terminal = open_terminal()
        super().__init__(stdin=open(self.terminal, closefd=False), stdout=open(self.terminal, "w", closefd=False),
                         nosigint=True)         # Ctrl-C stays the driver's
        self.prompt = f"(rank {rank}) "

    def interaction(self, *args, **kwargs):
        fcntl.lockf(self.terminal, fcntl.LOCK_EX)   # belongs to a process; the kernel releases it when that dies
        try:
            super().interaction(*args, **kwargs)
        finally:
            fcntl.lockf(self.terminal, fcntl.LOCK_UN)


@functools.cache    # one descriptor for good: closing another one of the same terminal would release the lock
def open_terminal() -> int:
    if os.isatty(0):
        return 0
    try:
        return os.open("/dev/tty", os.O_RDWR)
    except OSError as error:
        raise OSError(error.errno, "set_trace() found no terminal to read commands from: standard input is none and "
                      "/dev/tty cannot be opened; start the ranks from a terminal") from None
