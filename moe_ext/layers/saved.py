"""What the layers save in a forward for losses that are taken after it.

MegaBlocks appends to global lists. Here every layer has a Slot of fixed length, and the functions of moe.py and
router.py read and clear all slots at once. So torch.compile meets no length that changes and compiles a layer once;
and where nobody clears, a layer holds the statistics of its last KEPT + 1 forwards and no more: to read them then is
refused, because older ones are lost.

A forward saves if gradients are on; not under torch.export, and not when activation checkpointing repeats it in
backward.
"""

import itertools
import weakref

import torch

from moe_ext import private

private.require("moe_ext.layers")

KEPT = 16  # forwards of one layer (micro-batches, or calls of one shared by several depths) between two clears

# torch 2.11 calls every compiled frame exporting (2.13 does not, 2.12 is untried).
_CALLS_ALL_EXPORTING = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

_slots = {}  # kind -> weak references to its slots, in order of construction


class _Record:
    """A forward's value. A class, not a tuple or None: torch.compile guards on those, on this only where it is read."""

    def __init__(self, value):
        self.value = value


_NOTHING = _Record(None)


class Slot:
    """The newest values that one layer saved, for one kind of loss. A copy of the layer starts with an empty one."""

    def __init__(self, kind):
        self.kind = kind
        self.empty()
        _slots.setdefault(kind, []).append(weakref.ref(self))

    def __reduce__(self):
        return Slot, (self.kind,)

    def empty(self):
        self.records = (_NOTHING,) * (KEPT + 1)

    def add(self, value):
        """Keep the value if gradients are on and this is no recomputation.

        RuntimeError where the forward was checkpointed with use_reentrant=True: it ran without gradients, so that a
        loss of what it saved has none.
        """
        compiled = _CALLS_ALL_EXPORTING and torch.compiler.is_dynamo_compiling()
        if not torch.is_grad_enabled() or (torch.compiler.is_exporting() and not compiled):
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # inside a backward
            if "CheckpointFunction" in torch._C._current_autograd_node().name():
                raise RuntimeError(
                    f"the {self.kind} would get no gradient under torch.utils.checkpoint(.., use_reentrant=True). "
                    "Pass use_reentrant=False, or set the loss's weight in Arguments to 0"
                )
            return
        self.records = (_Record(value), *self.records[:-1])


def _living(kind):
    _slots[kind] = [slot for slot in _slots.get(kind, []) if slot() is not None]
    return [slot() for slot in _slots[kind]]


def read(kind, clear):
    """All values of a kind since the last clear: the first of each layer, then the second of each, ...

    ValueError if a layer saved more than KEPT of them; it names `clear`, the function to call.
    """
    calls = []
    for slot in _living(kind):
        values = [record.value for record in reversed(slot.records) if record is not _NOTHING]
        if len(values) == len(slot.records):
            raise ValueError(
                f"a layer saved for the {kind} in more than {len(values) - 1} forwards, and the oldest are lost: call "
                f"{clear}() after each step, or raise moe_ext.layers.saved.KEPT before the layers are made"
            )
        calls.append(values)
    return [value for call in itertools.zip_longest(*calls) for value in call if value is not None]


def clear(kind):
    """Forget all values of a kind."""
    for slot in _living(kind):
        slot.empty()
