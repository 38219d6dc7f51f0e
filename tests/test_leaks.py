"""No op keeps memory of its calls. Counted by the C allocator: resident memory hides what goes into free heap."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from test_compile import layer, record, run

from moe_ext import ops
from moe_ext.ops import enums

CALLS = 200_000  # of all ops together
BOUND = 8  # bytes per call; torch before 2.14 leaks 48 for a str


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def allocated():
    """Bytes that this process has from malloc and has not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def growth(call, times):
    """Bytes per call, once the first calls have made what lasts."""
    for _ in range(20):
        call()
    before = allocated()
    for _ in range(times):
        call()
    return (allocated() - before) / times


@pytest.fixture(autouse=True)
def glibc():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")


def test_the_count_sees_a_leak():
    malloc = ctypes.CDLL(None).malloc
    assert growth(lambda: malloc(ctypes.c_size_t(24)), 10_000) > BOUND


@pytest.mark.c_core
def test_no_op_leaks():
    """Every op and pattern of absent arguments, forwards and backwards, called below autograd."""
    calls = record("cpu").values()
    leaks = {}
    with torch._C._AutoDispatchBelowAutograd():
        for op, args, kwargs in calls:
            bytes_per_call = growth(lambda op=op, args=args, kwargs=kwargs: op(*args, **kwargs), CALLS // len(calls))
            if bytes_per_call > BOUND:
                leaks[op.name()] = bytes_per_call
    assert not leaks


@pytest.mark.c_core
def test_a_layer_does_not_leak():
    """Through autograd: router, index, experts and losses, forward and backward."""
    assert growth(lambda: run(layer, 4, "cpu"), 500) < BOUND


# ---- numbers for names: the mend of that leak ------------------------------------------------------------------------


def test_no_op_takes_a_string():
    import moe_ext.parallel.transport  # noqa: F401  its ops are of the same binary

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(("moe_ext::", "moe_wire::")):
            op, _, overload = name.partition(".")
            schema = torch._C._get_schema(op, overload)
            assert "str" not in [str(a.type) for a in schema.arguments], schema


@pytest.mark.parametrize("names, enum", [(enums.ACTS, "act"), (enums.SCORES, "score"), (enums.BALANCES, "balance")])
def test_names_have_the_numbers_of_the_c_core(names, enum):
    header = Path(__file__).parent.parent.joinpath("csrc", "moe.h").read_text()
    members = "".join(re.search(rf"typedef enum {{([^{{}}]*)}} moe_{enum};", header)[1].split()).split(",")
    prefix = "MOE_BALANCE_" if enum == "balance" else "MOE_"
    assert names == {member.removeprefix(prefix).lower(): i for i, member in enumerate(members)}


@pytest.mark.parametrize("act", enums.ACTS)
def test_messages_of_the_binary_have_the_same_names(act):
    """Which has their names once more, for messages about a gate; and which acts have one."""
    if act in enums.GATED:
        with pytest.raises(RuntimeError, match=f"but {act} wants"):
            ops.activation(torch.randn(2, 3), act)
    else:
        x, w, index = torch.randn(2, 3), torch.randn(1, 3, 3), ops.route_index(torch.zeros(2, 1, dtype=torch.int32), 1)
        with pytest.raises(RuntimeError, match=f'act="{act}" has no gate'):
            ops.expert_mlp(x, w, w, w, torch.ones(2, 1), index, act=act)


@pytest.mark.parametrize("number", [-1, len(enums.ACTS)])
def test_a_number_of_no_name_is_refused(number):
    with pytest.raises(RuntimeError, match=f"act is {number}, wanted 0 .. {len(enums.ACTS) - 1}"):
        torch.ops.moe_ext.activation(torch.randn(2, 4), number)
