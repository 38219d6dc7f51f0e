"""First contact with each of the kernels that only Hopper has (cuda/sm90.cuh): a check for a process of its own each,
because a kernel that waits in vain traps after twenty seconds and takes its process with it.

    PYTHONPATH=.:tests python tests/gpu/hopper.py cuda "rows 128x192" ..

Every memory that a kernel should write begins as NaN; two runs have the same bits; the rows, the weights and the
gradients of all other experts, and the rows of nobody, may be NaN; experts are ragged, empty, and more than the device
takes at once; and results and gradients obey the tests' rule against fp64. Which kernel ran is counted, so that none
passes by staying away. On Hopper alone.

In place of cuda: cpu, which tries this code on the C core and proves nothing of a kernel; or a library of
tests/simt/Makefile."""

import sys

import devices
import torch
from cases import Case, Shape
from compare import close, doubles, evaluate, same
from test_expert import BIASES, GATED, mlp_call, mlp_inputs

from moe_ext import ops, reference
from tests import cublas

NOBODY = 37  # rows behind those of the last expert
RAGGED = [0, 1, 127, 128, 129, 0, 300, 64, 1000, 0]
# Rows of experts, inner and outer width. The last two are many tiles for each multiprocessor.
PRODUCTS = [(RAGGED, 200, 520), ([1024] * 4, 2048, 768), ([12288 // (e + 1) for e in range(128)], 264, 1536)]
FEW_PRODUCTS = [([0, 1, 127, 130, 0, 40], 72, 136)]
MLPS = [
    Case("ragged", Shape(300, 136, 72, 9, 3), "some_absent"),
    Case("empty", Shape(700, 328, 264, 17, 2), "empty_experts"),
    Case("skewed", Shape(8192, 512, 384, 64, 4), "skewed"),
]
FEW_MLPS = [Case("ragged", Shape(90, 72, 40, 5, 3), "some_absent")]
ALONE = Case("alone", Shape(500, 136, 200, 5, 1), "skewed")


class Card:
    """Where to run, how much of it, and the count of what ran."""

    def __init__(self, where):
        self.device, self.table = torch.device("cuda" if where == "cuda" else "cpu"), None
        if where == "cuda":
            self.table = cublas.load()
        elif where != "cpu":
            devices.serve(where)
            self.table = cublas.load(where)
        few = where != "cuda"
        self.products, self.mlps = (FEW_PRODUCTS, FEW_MLPS) if few else (PRODUCTS, MLPS)

    def run(self, call, way=None):
        """call(), where all products go this way; or any but that of gemm.cuh."""
        if not self.table:
            return call()
        result, ran = cublas.ways(self.table, cublas.forced(self.table, way, call) if way else call)
        assert ran and set(ran) <= ({way} if way else set(cublas.WAYS[1:])), f"wanted {way or 'sm90'}, ran {ran}"
        return result

    def twice(self, call, way=None):
        result, again = self.run(call, way), self.run(call, way)
        if isinstance(result, dict):
            for name, value in result.items():
                same(again[name], value, f"{name} of the second run")
        else:
            same(again, result, "the second run")
        return result


def bins_of(rows, card):
    return torch.tensor(rows).cumsum(0).int().to(card.device)


def some(rows):
    """A few experts, among them the longest and an empty one."""
    order = sorted(range(len(rows)), key=lambda e: rows[e])
    return sorted({order[0], order[len(order) // 2], order[-1], 1, len(rows) - 1})


def others_nan(x_RI, bins_E, e):
    """All rows but those of expert e are NaN."""
    begin, end = int(bins_E[e - 1]) if e else 0, int(bins_E[e])
    alone_RI = torch.full_like(x_RI, torch.nan)
    alone_RI[begin:end] = x_RI[begin:end]
    return alone_RI, slice(begin, end)


def rows(card, way):
    """y[p] = x[p] w[e], w along the sum and across it."""
    for lengths, I, O in card.products:
        for dtype in (torch.bfloat16, torch.float16):
            bins_E, R = bins_of(lengths, card), sum(lengths)
            x_RI = torch.randn(R + NOBODY, I).to(card.device, dtype)
            x_RI[R:] = torch.nan
            w_EOI = (torch.randn(len(lengths), O, I) / I**0.5).to(card.device, dtype)
            for w_EIO in (w_EOI.mT, w_EOI.mT.contiguous()):
                y_RO = card.twice(lambda x=x_RI, w=w_EIO, bins=bins_E: ops.grouped_gemm(x, w, bins), way)
                close(y_RO, reference.grouped_gemm(x_RI, w_EIO, bins_E),
                      reference.grouped_gemm(x_RI.double(), w_EIO.double(), bins_E))  # fmt: skip
                assert y_RO[R:].eq(0).all(), "rows of nobody are zeros"
                for e in some(lengths):
                    x_alone, its = others_nan(x_RI, bins_E, e)
                    w_alone = torch.full_like(w_EIO, torch.nan)
                    w_alone[e] = w_EIO[e]
                    got = card.run(lambda x=x_alone, w=w_alone, bins=bins_E: ops.grouped_gemm(x, w, bins), way)
                    same(got[its], y_RO[its], f"expert {e} beside NaN")


def sums(card, way):
    """dw[e] = x^T dy over the rows of e."""
    for lengths, I, O in card.products:
        for dtype in (torch.bfloat16, torch.float16):
            bins_E, R = bins_of(lengths, card), sum(lengths)
            x_RI, dy_RO = (torch.randn(R + NOBODY, n).to(card.device, dtype) for n in (I, O))
            x_RI[R:] = dy_RO[R:] = torch.nan

            def wgrad(x, dy, bins=bins_E):
                return card.run(lambda: ops.grouped_gemm_wgrad(x, dy, bins), way)

            dw_EIO = wgrad(x_RI, dy_RO)
            same(wgrad(x_RI, dy_RO), dw_EIO, "the second run")
            close(dw_EIO, reference.grouped_gemm_wgrad(x_RI, dy_RO, bins_E),
                  reference.grouped_gemm_wgrad(x_RI.double(), dy_RO.double(), bins_E))  # fmt: skip
            for e in some(lengths):
                assert lengths[e] or dw_EIO[e].eq(0).all(), "an expert without rows has zeros"
                got = wgrad(others_nan(x_RI, bins_E, e)[0], others_nan(dy_RO, bins_E, e)[0])
                same(got[e], dw_EIO[e], f"expert {e} beside NaN")


def mlp(card, act, wanted):
    """The expert MLP with the gradients of these, or of nothing; its kernels are those that these need."""
    for case in card.mlps:
        for dtype in (torch.bfloat16, torch.float16):
            for biases in ((), BIASES):
                drawn = mlp_inputs(case, dtype, card.device, act in GATED, biases)
                for stored in ("separate", "w13", "transposed") if act in GATED else ("separate", "transposed"):
                    call, inputs = mlp_call(case, act, card.device, stored), dict(drawn)
                    if act not in GATED and stored == "transposed":     # else the call does it
                        inputs |= {name: drawn[name].mT.contiguous().mT for name in ("gate", "down")}

                    def values(impl, inputs, call=call):
                        return results(lambda **x: call(impl, **x), inputs, wanted)

                    got = card.twice(lambda values=values, inputs=inputs: values(ops, inputs))
                    plain, oracle = values(reference, inputs), values(reference, doubles(inputs))
                    for name in got:
                        close(got[name], plain[name], oracle[name], f"{case.name} {dtype} {stored} {biases}: {name}")
    alone(card, act, wanted)


def results(call, inputs, wanted):
    if wanted:
        return evaluate(call, inputs, wanted)
    with torch.no_grad():
        return {"y": call(**inputs)}


def alone(card, act, wanted):
    """One choice per token: a token's rows, and its expert's gradients, do not know of those of other experts."""
    E, ids_T = ALONE.shape.E, ALONE.ids(card.device)[:, 0]
    inputs = mlp_inputs(ALONE, torch.bfloat16, card.device, act in GATED, BIASES)
    call = mlp_call(ALONE, act, card.device)
    want = card.run(lambda: results(lambda **x: call(ops, **x), inputs, wanted))
    for e in range(E):
        mine = ids_T == e
        changed = {name: x.clone() for name, x in inputs.items()}
        changed["x_RD"][~mine] = torch.nan
        for name in changed.keys() - {"x_RD", "weights_RK"}:
            changed[name][torch.arange(E, device=card.device) != e] = torch.nan
        got = card.run(lambda changed=changed: results(lambda **tensors: call(ops, **tensors), changed, wanted))
        for name in got:
            its = mine if name in ("y", "result 0", "dx_RD", "dweights_RK") else e
            same(got[name][its], want[name][its], f"{name} of expert {e} beside NaN")


CHECKS = {
    **{f"rows {tile}": (rows, f"sm90 {tile}") for tile in ("128x256", "128x192", "128x128")},
    **{f"sums {tile}": (sums, f"sm90 {tile}") for tile in ("128x256", "128x128")},
    "mlp plain": (mlp, "gelu", ()),
    "mlp gated": (mlp, "swiglu", ()),
    # Each has one kernel more than those before it: dA' of gathered dy, and dact_pass; that with sums; sort_rows of
    # dy; of x; and the other way round
    "mlp ds": (mlp, "swiglu", ("weights_RK",)),
    "mlp db": (mlp, "swiglu", ("weights_RK", "gate_bias", "up_bias", "down_bias")),
    "mlp dw2": (mlp, "swiglu", ("down",)),
    "mlp dw13": (mlp, "swiglu", ("gate", "up")),
    "mlp dx": (mlp, "swiglu", ("x_RD",)),
    "mlp all": (mlp, "gelu", ("x_RD", "weights_RK", "gate", "down")),
}


def why_not():
    """Why this is no card for it, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    found = torch.cuda.get_device_capability()
    return "" if found == (9, 0) else f"compute capability {found[0]}.{found[1]}, these kernels need 9.0"


def main(where, *names):
    if where == "cuda" and (why := why_not()):
        print(f"left out: {why}")
        return
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    card = Card(where)
    for name in names or CHECKS:
        check, *arguments = CHECKS[name]
        check(card, *arguments)
        print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
