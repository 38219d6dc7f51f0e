"""Where cuda/policy_sm90.cuh is off on this card: python -m benchmarks.policy, a few minutes on a Hopper GPU.

Each product of a layer that the policy decides, as an op of its own: down and dA' (forward and dgrad of the down
projection), dx (dgrad of gate and up as one), dW13 and dW2 (the weight gradients), and up without its activation. Every
way that can compute it is forced in turn, and in the chosen way groups of 8, 16 and 32 row tiles, in the rounds of
benchmarks/gpu.py, beside the policy's own choice. A line is off by the time that the best of all would save; more than
3 % is printed bold. Two groups that an expert has no more row tiles than are one order: they show the noise, in which a
card that is at its limit of power may differ by 6 %.
"""

import argparse
import math
import sys
import time

import moe_ext
from benchmarks.gpu import DRY_SHAPES, ROUTINGS, SHAPES, Bench, Routed
from moe_ext import ops
from tests import cublas

GROUPS = {f"group {group}": group for group in (8, 16, 32)}


def products(bench, shape):
    """name -> R, I, O and its call, which takes a Routed."""
    T, D, width, E, K = shape
    R = T * K
    x_RD, h_RU, a_RF = bench.randn(R, D), bench.randn(R, 2 * width), bench.randn(R, width)
    w13, w2 = bench.randn(E, 2 * width, D, scale=D**-0.5), bench.randn(E, D, width, scale=width**-0.5)
    gemm, wgrad = ops.grouped_gemm, ops.grouped_gemm_wgrad
    return {
        "up": (R, D, 2 * width, lambda r: gemm(x_RD, w13.mT, r.bins_E)),
        "down": (R, width, D, lambda r: gemm(a_RF, w2.mT, r.bins_E)),
        "dA'": (R, D, width, lambda r: gemm(x_RD, w2, r.bins_E)),
        "dx": (R, 2 * width, D, lambda r: gemm(h_RU, w13, r.bins_E)),
        "dW13": (R, 2 * width, D, lambda r: wgrad(h_RU, x_RD, r.bins_E)),
        "dW2": (R, D, width, lambda r: wgrad(x_RD, a_RF, r.bins_E)),
    }


def candidates(bench, product, call, routed):
    """-> {way, or group in the policy's way: call} of those that can, and the policy's way."""
    if not bench.cublas:        # a dry run
        return {"ours": call}, None
    kind = "sums" if product.startswith("dW") else "rows"
    found, chosen = {}, None
    if not any(name.startswith(kind) for name in bench.without):
        found["ours"], ((chosen, _),) = call, cublas.ways(bench.cublas, lambda: call(routed))[1].items()
    for way in cublas.WAYS:
        if way.replace("sm90", kind) in bench.without:
            continue
        run = cublas.forced(bench.cublas, way, call)
        if way in cublas.ways(bench.cublas, lambda run=run: run(routed))[1]:
            found[way] = run
    if chosen in cublas.WAYS[1:]:
        found |= {name: cublas.forced(bench.cublas, chosen, call, group) for name, group in GROUPS.items()}
    return found, chosen


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["balanced"])
    parser.add_argument("--seconds", type=float, default=0.3, help="of rounds per line")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="begin no line later")
    parser.add_argument("--without", nargs="*", default=[], metavar="KERNEL", help="those of tests/gpu/hopper.py")
    parser.add_argument("--dry", action="store_true", help="a tiny shape on the CPU: tries the code, measures nothing")
    options = parser.parse_args(arguments)
    options.dtype, options.seconds = "bf16", 0 if options.dry else options.seconds
    if not options.dry and not moe_ext.has_cuda():
        sys.exit(f"error: no GPU to measure: {moe_ext._C.cuda() or 'torch sees no CUDA device'}. Hint: --dry")
    bench, deadline = Bench(options), time.perf_counter() + options.limit
    bench.warm_up()
    shapes = DRY_SHAPES if options.dry else {name: SHAPES[name] for name in options.shapes}
    forms = [*cublas.WAYS, *GROUPS]
    titles = ["shape", "routing", "product", "policy", "TFLOP/s", "off by", *forms]
    print(f"{bench.name}, commit {bench.report['commit']}\n\n| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    for name, shape in shapes.items():
        for routing in options.routings:
            for product, (R, I, O, call) in products(bench, shape).items():
                if time.perf_counter() > deadline:
                    print(f"left out: {name} {routing} {product} and all after it")
                    return
                draw = Routed(bench, shape, routing)
                calls, chosen = candidates(bench, product, call, draw())
                seconds, failed = bench.race(calls, draw, set(forms) if "ours" in calls else set())
                if failed:
                    sys.exit(f"error: {name} {product}: {failed}")
                ours = seconds.pop("ours", min(seconds.values()))
                off = max([0, *(1 - s / ours for s in seconds.values())])
                cells = [name, routing, product, str(chosen), f"{2 * R * I * O / ours / 1e12:.0f}",
                         f"**{off:.1%}**" if off > 0.03 else f"{off:.1%}"]  # fmt: skip
                cells += [f"{1e3 * seconds[form]:.3f} ms" if form in seconds else "-" for form in forms]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
