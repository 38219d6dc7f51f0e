"""The grouped products with cuBLAS, one product per expert (cuda/cublas.cu), and which way ours went: the head of
libmoe_cuda.so's table through ctypes, for benchmarks and tests. No op of ours uses it."""

import ctypes
import os
from pathlib import Path

import torch

import moe_ext

SIZE, INT64, POINTER = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
WAYS = ["gemm.cuh", "sm90 128x256", "sm90 128x192", "sm90 128x128"]  # moe_way of cuda/api.h
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Mat(ctypes.Structure):
    _fields_ = [("p", POINTER), ("se", INT64), ("sr", INT64), ("sc", INT64)]


def function(*arguments):
    return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)


class Table(ctypes.Structure):
    """The head of moe_cuda (cuda/api.h)."""

    _fields_ = [
        ("size", SIZE),
        ("ready", function(ctypes.c_int)),
        ("error", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        *((name, POINTER) for name in ("verdict", "nccl_id", "nccl_open", "window_open", "slots_open")),
        ("gemm", function(ctypes.c_int, *[INT64] * 4, POINTER, Mat, *[POINTER] * 4)),
        ("wgrad", function(ctypes.c_int, *[INT64] * 4, *[POINTER] * 4, Mat, POINTER)),
        ("products", ctypes.CFUNCTYPE(None, ctypes.POINTER(INT64))),
        ("force", ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)),
    ]


def load(library=None):
    """The table of that library, by default of the one beside moe_ext._C."""
    library = ctypes.CDLL(os.path.abspath(library or Path(moe_ext.__file__).parent / "libmoe_cuda.so"))
    library.moe_cuda_table.restype = ctypes.POINTER(Table)
    table = library.moe_cuda_table().contents
    if table.ready(0):
        raise RuntimeError(table.error().decode())
    return table


def products(table):
    """How many products this process has launched, by way."""
    counts = (INT64 * len(WAYS))()
    table.products(counts)
    return list(counts)


def ways(table, call):
    """What call() returns, and {way: number of products} that it launched, on any thread."""
    before = products(table)
    result = call()
    launched = zip(WAYS, before, products(table), strict=True)
    return result, {way: after - before for way, before, after in launched if after > before}


def forced(table, way, call, group=0):
    """call, with every product that can going this way of WAYS, those of Hopper's with so many row tiles together
    (0: as the policy says)."""

    def run(*arguments):
        table.force(WAYS.index(way), group)
        try:
            return call(*arguments)
        finally:
            table.force(-1, 0)

    return run


def matrix(tensor):
    return Mat(tensor.data_ptr(), *tensor.stride())


def head(x, bins_E, I, O):
    return DTYPES[x.dtype], len(x), len(bins_E), I, O


def stream(x):
    return torch.cuda.current_stream().cuda_stream if x.is_cuda else None


def grouped_gemm(table, x_RI, w_EIO, bins_E, y_RO):
    """Writes y_RO[bin e] = x_RI[bin e] w_EIO[e]. A status other than 0 is a RuntimeError."""
    status = table.gemm(*head(x_RI, bins_E, *w_EIO.shape[1:]), x_RI.data_ptr(), matrix(w_EIO), bins_E.data_ptr(), None,
                        y_RO.data_ptr(), stream(x_RI))  # fmt: skip
    return done(table, status, y_RO)


def grouped_gemm_wgrad(table, x_RI, dy_RO, bins_E, dw_EIO):
    """Writes dw_EIO[e] = x_RI[bin e]^T dy_RO[bin e]."""
    status = table.wgrad(*head(x_RI, bins_E, *dw_EIO.shape[1:]), x_RI.data_ptr(), dy_RO.data_ptr(), bins_E.data_ptr(),
                         None, matrix(dw_EIO), stream(x_RI))  # fmt: skip
    return done(table, status, dw_EIO)


def done(table, status, result):
    if status:
        raise RuntimeError(f"status {status}: {table.error().decode()}")
    return result
