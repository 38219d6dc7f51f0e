"""What the reports of a Hopper card say of the bars that its kernels were written to, and of what was predicted.

    python -m benchmarks.bars [--log] build/gpu/nvidia-h200-COMMIT.json [build/gpu/train-nvidia-h200-COMMIT.json]

Reports of benchmarks/gpu.py and benchmarks/train.py, any number of them. Prints a line per bar: met or missed, measured
against bar, and where it was worst. --log writes what was measured into the column "outcome" of hopper-log.md beside
the predictions: a row is found by what it is about, the name of a figure below. Of several versions' the last is meant;
an outcome that is there stays.
"""

import argparse
import json
import re
from pathlib import Path

PRODUCT, BIASES = re.compile(r"\b(rows|sums|gemm)_kernel"), re.compile(r"\bbias_(parts|totals)_kernel")
LOG = Path(__file__).parent / "hopper-log.md"
OF_BMM, OF_GROUPED_MM, LARGE = 0.97, 1.05, 1024  # of experts with so many rows
OF_BOUND = {"F": 1.3, "F+B": 1.5}
TFLOPS, LAYER = 550, "qwen3-30b-32k"
OF_BEFORE = 1.8
OUTSIDE, OF_BIASES, OF_COPY, OF_SPREAD = 0.12, 0.02, 0.95, 1.5


def products(report):
    """(form, routing, "shape projection form routing", line) of each product that ran."""
    for line in report.get("gemm", []):
        if "ours" in line["ms"]:
            yield line["form"], line["routing"], f"{line['shape']} {line['projection']} {line['form']}", line


def layers(report):
    for line in report.get("layer", []):
        if "ours" in line["ms"]:
            yield line["pass"], line["routing"], f"{line['shape']} {line['pass']}", line


def figures(reports):
    """{name: (value, its text)} of all that the reports hold: speed over a peer, TFLOP/s, shares of a copy, ms."""
    found = {}

    def add(name, value, form="{:.2f}"):
        found[name] = value, form.format(value)

    for report in reports:
        for kind in (products, layers):
            for _, routing, name, line in kind(report):
                at = f"{name} {routing}"
                add(f"{at}, TFLOP/s", line["tflops"], "{:.0f}")
                for peer, ratio in line["ratio"].items():
                    add(f"{at}, x {peer}", ratio)
        for line in report.get("layer", []):
            if {"ours", "mma.sync"} <= set(line.get("peak", {})):
                T, D, K = (line[size] for size in ("T", "d", "k"))
                more = line["peak"]["ours"] - line["peak"]["mma.sync"]
                add(f"{line['shape']} {line['pass']} {line['routing']}, sorted copies more memory than mma.sync",
                    more / (2 * T * K * D))  # fmt: skip
        for line in report.get("other", []):        # of the widest shape: LAYER
            if "ours" in line["ms"]:
                add(f"{LAYER} {line['op']}, ms", line["ms"]["ours"], "{:.3f}")
        kernels = report.get("kernels", [])
        for line in kernels:
            if line["roofline"]:
                add(f"{line['shape']} {pass_of(line['kernel'])}, of copy", line["roofline"])
        for name, part in (("outside products", lambda line: not PRODUCT.search(line["kernel"])),
                           ("bias sums", lambda line: BIASES.search(line["kernel"]))):
            if kernels:
                share = sum(line["share"] for line in kernels if part(line))
                add(f"{kernels[0]['shape']} {name}, of layer", share, "{:.1%}")
        speed = {line["tree"]: line.get("tokens/s") for line in report.get("lines", []) if line.get("tokens/s")}
        for tree, tokens in speed.items():
            add(f"{report['recipe']} {tree}, tokens/s", tokens, "{:.0f}")
            if tree != "ours" and "ours" in speed:
                add(f"{report['recipe']}, x {tree}", speed["ours"] / tokens)
    return found


def pass_of(kernel):
    return next(part for part in ("sort_rows", "dact", "sum_slots") if part in kernel)


def worst(values, bar, what):
    """(bar, met, text) of {where: value}, all of which should reach the bar."""
    below = sum(value < bar for value in values.values())
    where = min(values, key=values.get)
    return what, not below, f"{values[where]:.2f} vs {bar} at worst, {where}; {below} of {len(values)} below"


def bars(reports):
    """(bar, met, measured vs bar) of every bar that the reports can judge."""
    result, found = [], figures(reports)
    for form in ("forward", "dgrad", "wgrad"):
        for routing in ("balanced", "zipf"):
            lines = [(name, line) for report in reports for *kind, name, line in products(report)
                     if kind == [form, routing]]  # fmt: skip
            of_bmm = {name: line["ratio"]["bmm"] for name, line in lines
                      if "bmm" in line["ratio"] and line["rows"] >= LARGE * line["E"]}  # fmt: skip
            of_mm = {name: line["ratio"]["grouped-mm"] for name, line in lines if "grouped-mm" in line["ratio"]}
            if of_bmm:
                result.append(worst(of_bmm, OF_BMM, f"{form} {routing}, x bmm"))
            if of_mm:
                result.append(worst(of_mm, OF_GROUPED_MM, f"{form} {routing}, x grouped-mm"))
    for kind, bar in OF_BOUND.items():
        of_bound = {f"{name} {routing}": line["ratio"]["bound"] for report in reports
                    for k, routing, name, line in layers(report) if k == kind and "bound" in line["ratio"]}  # fmt: skip
        if of_bound:
            result.append(worst(of_bound, bar, f"layer {kind}, x bound"))

    def against(name, bar, text, reaches=lambda value, bar: value >= bar):
        if name in found:
            value, said = found[name]
            result.append((name, reaches(value, bar), f"{said} vs {text}"))

    def at_most(value, bar):
        return value <= bar

    for kind, bar in OF_BOUND.items():
        against(f"{LAYER} {kind} balanced, TFLOP/s", TFLOPS, TFLOPS)
        against(f"{LAYER} {kind} balanced, x bound", bar, bar)
        for routing in ("balanced", "zipf"):
            against(f"{LAYER} {kind} {routing}, sorted copies more memory than mma.sync", 1, "at most 1", at_most)
    against(f"{LAYER} outside products, of layer", OUTSIDE, f"at most {OUTSIDE:.0%}", at_most)
    against(f"{LAYER} bias sums, of layer", OF_BIASES, f"at most {OF_BIASES:.0%}", at_most)
    against(f"{LAYER} sort_rows, of copy", OF_SPREAD, OF_SPREAD)
    against(f"{LAYER} dact, of copy", OF_COPY, OF_COPY)
    against(f"{LAYER} sum_slots, of copy", OF_COPY, OF_COPY)
    for name in [name for name in found if name.endswith(", x before")]:
        against(name, OF_BEFORE, OF_BEFORE)
    return result


def fill(text, found, commit):
    """The log with the outcome of each figure in the last row about it, if that has none; a row is
    | version | what | why | predicted | outcome |."""
    rows, seen = [], set()
    for row in reversed(text.splitlines()):
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if row.startswith("|") and len(cells) == 5:
            if cells[1] in found and cells[1] not in seen and not cells[4]:
                cells[4] = f"{found[cells[1]][1]} ({commit})"
                row = f"| {' | '.join(cells)} |"
            seen.add(cells[1])
        rows.append(row)
    return "\n".join(reversed(rows)) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--log", action="store_true", help="write the outcomes into hopper-log.md")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text()) for path in options.reports]
    for name, met, text in bars(reports):
        print(f"{'met' if met else 'missed':<8}{name}: {text}")
    if options.log:
        LOG.write_text(fill(LOG.read_text(), figures(reports), reports[0]["commit"]))


if __name__ == "__main__":
    main()
