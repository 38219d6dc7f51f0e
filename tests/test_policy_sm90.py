"""What cuda/policy_sm90.cuh chooses for products of published layers on an H100 or H200: a change of it shows here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cases import Shape

HEADER = Path(__file__).parent.parent / "cuda" / "policy_sm90.cuh"

# T, d, h, E, k. Then the tile's columns, its rows being 128, of: up (gathered, gated), down, dA', dx, dW13, dW2.
CHOICES = {
    "qwen3-30b-32k": (Shape(32768, 2048, 768, 128, 8), "256 192 256 256 256 256"),
    "qwen3-30b-8k": (Shape(8192, 2048, 768, 128, 8), "256 192 192 256 256 256"),
    "qwen3-next": (Shape(32768, 2048, 512, 512, 10), "256 192 256 192 256 256"),
    "qwen3-235b": (Shape(8192, 4096, 1536, 128, 8), "256 256 256 256 256 256"),
    "olmoe": (Shape(32768, 2048, 1024, 64, 8), "256 192 256 256 256 256"),
    "mixtral": (Shape(8192, 4096, 14336, 8, 2), "256 256 256 256 256 256"),
    "gpt-oss-120b": (Shape(8192, 2880, 2880, 128, 4), "256 192 192 192 256 256"),
    "glm-4.5-air": (Shape(8192, 4096, 1408, 128, 8), "256 256 128 256 256 128"),
    "deepseek-v3": (Shape(8192, 7168, 2048, 256, 8), "256 256 256 256 256 256"),
    "seed": (Shape(2048, 768, 3072, 4, 2), "256 256 192 256 256 128"),
    "sonic-1.4b-256": (Shape(40960, 768, 256, 128, 8), "256 192 128 192 256 256"),
    "sonic-1.4b-1024": (Shape(40960, 768, 1024, 32, 2), "256 192 128 192 256 256"),
    "sonic-7b-256": (Shape(24576, 1536, 256, 128, 8), "256 192 256 192 256 256"),
    "sonic-7b-1024": (Shape(24576, 1536, 1024, 32, 2), "256 192 256 192 256 256"),
    "sonic-30b-256": (Shape(32768, 4096, 256, 256, 16), "256 192 256 192 256 256"),
    "sonic-30b-1024": (Shape(32768, 4096, 1024, 64, 4), "256 192 256 256 256 256"),
    "sonic-120b-2048": (Shape(32768, 4096, 2048, 64, 4), "256 256 256 256 256 256"),
    "token rounding": (Shape(16384, 4096, 512, 256, 8), "256 192 256 192 256 256"),
}
PROGRAM = """
#include <cstdio>
#include "HEADER"
int main() {
    const int columns[] = {0, 256, 192, 128};
    long T, d, h, E, k;
    while (scanf("%ld %ld %ld %ld %ld", &T, &d, &h, &E, &k) == 5) {
        const auto rows = [&](long n, long depth, bool up) {
            return columns[sm90_rows_way(T * k, E, n, depth, up, up ? 2 : 1, 132)];
        };
        const auto sums = [&](long m, long n) { return columns[sm90_sums_way(T * k, E, m, n, 132)]; };
        printf("%d %d %d %d %d %d\\n", rows(2 * h, d, true), rows(d, h, false), rows(h, d, false),
               rows(d, 2 * h, false), sums(2 * h, d), sums(d, h));
    }
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_choices(tmp_path):
    (tmp_path / "policy.cpp").write_text(PROGRAM.replace("HEADER", str(HEADER)))
    command = "g++ -std=c++20 -Wall -Wextra -Werror policy.cpp -o policy"
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    shapes = "\n".join(" ".join(map(str, shape)) for shape, _ in CHOICES.values())
    done = subprocess.run([tmp_path / "policy"], input=shapes, capture_output=True, text=True, check=True)
    chosen = dict(zip(CHOICES, done.stdout.splitlines(), strict=True))
    assert chosen == {name: wanted for name, (_, wanted) in CHOICES.items()}
