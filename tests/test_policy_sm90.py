"""What cuda/policy_sm90.cuh chooses for products of published layers on an H100 or H200: a change of it shows here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cases import Shape

HEADER = Path(__file__).parent.parent / "cuda" / "policy_sm90.cuh"

# T, d, h, E, k. Then, on an H200 where no other is named, the tile's columns, its rows being 128, and how many row
# tiles are done together, of: up (gathered, gated), down, dA', dx, dW13, dW2.
CHOICES = {
    "qwen3-30b-32k": (Shape(32768, 2048, 768, 128, 8), "256:32 192:32 256:32 256:32 256:32 256:32"),
    "qwen3-30b-8k": (Shape(8192, 2048, 768, 128, 8), "256:32 192:32 192:32 256:32 256:32 256:32"),
    "qwen3-next": (Shape(32768, 2048, 512, 512, 10), "256:32 192:32 256:32 192:32 256:32 256:32"),
    "qwen3-235b": (Shape(8192, 4096, 1536, 128, 8), "256:32 256:32 256:32 256:32 256:32 256:32"),
    "olmoe": (Shape(32768, 2048, 1024, 64, 8), "256:32 192:32 256:32 256:32 256:32 256:32"),
    "mixtral": (Shape(8192, 4096, 14336, 8, 2), "256:32 256:16 256:32 256:16 256:32 256:32"),
    "mixtral, H100": (Shape(8192, 4096, 14336, 8, 2), "256:16 256:16 256:16 256:16 256:32 256:32"),
    "gpt-oss-120b": (Shape(8192, 2880, 2880, 128, 4), "256:32 192:32 192:32 192:16 256:32 256:32"),
    "glm-4.5-air": (Shape(8192, 4096, 1408, 128, 8), "256:32 256:32 128:32 256:32 256:32 128:32"),
    "deepseek-v3": (Shape(8192, 7168, 2048, 256, 8), "256:16 256:32 256:16 256:32 256:32 256:32"),
    "seed": (Shape(2048, 768, 3072, 4, 2), "256:32 256:32 192:32 256:16 256:32 128:32"),
    "sonic-1.4b-256": (Shape(40960, 768, 256, 128, 8), "256:32 192:32 128:32 192:32 256:32 256:32"),
    "sonic-1.4b-1024": (Shape(40960, 768, 1024, 32, 2), "256:32 192:32 128:32 192:32 256:32 256:32"),
    "sonic-7b-256": (Shape(24576, 1536, 256, 128, 8), "256:32 192:32 256:32 192:32 256:32 256:32"),
    "sonic-7b-1024": (Shape(24576, 1536, 1024, 32, 2), "256:32 192:32 256:32 192:32 256:32 256:32"),
    "sonic-30b-256": (Shape(32768, 4096, 256, 256, 16), "256:32 192:32 256:32 192:32 256:32 256:32"),
    "sonic-30b-1024": (Shape(32768, 4096, 1024, 64, 4), "256:32 192:32 256:32 256:32 256:32 256:32"),
    "sonic-120b-2048": (Shape(32768, 4096, 2048, 64, 4), "256:32 256:32 256:32 256:32 256:32 256:32"),
    "token rounding": (Shape(16384, 4096, 512, 256, 8), "256:32 192:32 256:32 192:32 256:32 256:32"),
}
PROGRAM = """
#include <cstdio>
#include "HEADER"
int main() {
    const int columns[] = {0, 256, 192, 128}, sms = 132;
    long T, d, h, E, k, l2;
    while (scanf("%ld %ld %ld %ld %ld %ld", &T, &d, &h, &E, &k, &l2) == 6) {
        const auto print = [&](moe_way way, long depth, char end) {
            printf("%d:%d%c", columns[way], sm90_group(columns[way], depth, sms, l2 << 20), end);
        };
        const auto rows = [&](long n, long depth, bool up) {
            print(sm90_rows_way(T * k, E, n, depth, up, up ? 2 : 1, sms), depth, ' ');
        };
        const auto sums = [&](long m, long n, char end) {
            print(sm90_sums_way(T * k, E, m, n, sms), T * k / E, end);
        };
        rows(2 * h, d, true), rows(d, h, false), rows(h, d, false), rows(d, 2 * h, false);
        sums(2 * h, d, ' '), sums(d, h, '\\n');
    }
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_choices(tmp_path):
    (tmp_path / "policy.cpp").write_text(PROGRAM.replace("HEADER", str(HEADER)))
    command = "g++ -std=c++20 -Wall -Wextra -Werror policy.cpp -o policy"
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    l2 = {name: 50 if name.endswith("H100") else 60 for name in CHOICES}     # MiB
    shapes = "\n".join(" ".join(map(str, (*shape, l2[name]))) for name, (shape, _) in CHOICES.items())
    done = subprocess.run([tmp_path / "policy"], input=shapes, capture_output=True, text=True, check=True)
    chosen = dict(zip(CHOICES, done.stdout.splitlines(), strict=True))
    assert chosen == {name: wanted for name, (_, wanted) in CHOICES.items()}
