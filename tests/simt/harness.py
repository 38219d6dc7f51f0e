"""The libraries of tests/simt/Makefile, each built where a test asks for it."""

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def make(target, variant="plain"):
    """What `make` prints for a target of a variant."""
    done = subprocess.run(["make", "-sj2", "-f", "tests/simt/Makefile", f"VARIANT={variant}", target], cwd=ROOT,
                          text=True, check=True, stdout=subprocess.PIPE)  # fmt: skip
    return done.stdout.strip()


@functools.cache
def library(variant, name="libmoe_simt.so"):
    """The path of cuda/ (or of libtoy.so) compiled for the host."""
    path = f"build/simt/{variant}/{name}"
    make(path, variant)
    return ROOT / path
