#!/usr/bin/env bash
# An op of torch's stable C++ ABI that takes a `str` loses 48 bytes at every call, and it is the headers that decide: the
# same source compiled with torch 2.13's headers leaks on any torch, with 2.14.1's it does not, even when torch 2.13 runs
# it. One would expect an upgrade of torch to be what mends a leak inside torch; a binary built before must be rebuilt.
# An op that takes an `int` in its place leaks nothing.
#
# Seen: bytes per call, counted by glibc's mallinfo2 over 20,000 calls, torch 2.13.0+cpu running all of them:
#     headers 2.13.0: str 48, int 0        headers 2.14.1: str 0, int 0
# Needs: Python 3.11, g++ (C++20), glibc 2.33, network to a package index, 3 GB of disk. Half a minute after the downloads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy setuptools
venv/bin/pip download -q --no-deps -d wheels torch==2.14.1
venv/bin/python -m zipfile -e wheels/torch-2.14.1*.whl newer

cat > op.cpp <<'CPP'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <string>
using torch::stable::Tensor;
Tensor of_str(const Tensor &x, const std::string &name) { return torch::stable::empty_like(x); }
Tensor of_int(const Tensor &x, int64_t number) { return torch::stable::empty_like(x); }
STABLE_TORCH_LIBRARY(finding, m) {
    m.def("of_str(Tensor x, str name) -> Tensor");
    m.def("of_int(Tensor x, int number) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(finding, CPU, m) {
    m.impl("of_str", TORCH_BOX(&of_str));
    m.impl("of_int", TORCH_BOX(&of_int));
}
CPP

cat > count.py <<'PY'
import ctypes
import sys

import torch


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
torch.ops.load_library(sys.argv[1])
x, calls, found = torch.zeros(1), 20_000, []
for op, argument in ((torch.ops.finding.of_str, "swiglu"), (torch.ops.finding.of_int, 3)):
    for _ in range(2):      # the first round fills caches
        before = mallinfo2().uordblks
        for _ in range(calls):
            op(x, argument)
        grown = mallinfo2().uordblks - before
    found.append(round(grown / calls))
print("str {}, int {}".format(*found))
PY

torch=$(venv/bin/python -c 'import torch; print(torch.__path__[0])')
for headers in "2.13.0 $torch" "2.14.1 newer/torch"; do
    set -- $headers
    g++ -std=c++20 -O1 -shared -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem "$2/include" op.cpp \
        -L"$torch/lib" -ltorch_cpu -lc10 -o "op-$1.so"
    echo "headers $1: $(venv/bin/python count.py "./op-$1.so" 2> /dev/null)" | tee -a found
done
diff found - <<'SEEN' && echo "as it was seen"
headers 2.13.0: str 48, int 0
headers 2.14.1: str 0, int 0
SEEN
