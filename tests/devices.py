"""The devices that ops are tested on, and what each of them takes.

"cpu" is the C core, or under pytest --simt the kernels of cuda/ compiled for the host; "cuda" is there where torch sees
a GPU and libmoe_cuda.so lies beside the extension.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

import moe_ext

DEVICES = ["cpu"] + ["cuda"] * moe_ext.has_cuda()
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
simt = None  # path of the library that serves the CPU, under --simt


def floats(device):
    """The floating dtypes of the ops on a device. The kernels of cuda/ have no float64."""
    return FLOATS if device == "cpu" and not simt else FLOATS[1:]


def widest(device):
    return floats(device)[0]


def serve(path):
    """From now on this library's kernels serve tensors on the CPU; None is the C core again."""
    global simt
    simt, table = path, None
    if path:
        library = ctypes.CDLL(os.path.abspath(path))
        library.moe_cuda_table.restype = ctypes.c_void_p
        table = library.moe_cuda_table()
    fits = ctypes.CDLL(moe_ext._C.__file__).moe_cpu_serve(ctypes.c_void_p(table))
    assert fits, f"{path} and moe_ext are of different builds: make build, make -f tests/simt/Makefile"


def python(program, device, **environment):
    """Run a program in a process of its own, where `device`, a variable of it, is served as it is here."""
    head = f"import devices, torch, moe_ext; devices.serve({simt!r}); device = {device!r}\n"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment
    return subprocess.run([sys.executable, "-c", head + program], env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
