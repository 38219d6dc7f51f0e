// module.c: moe_ext._C as Python sees it: what was built and what runs here, and the index arrays of a dataset. The
// torch ops of the same binary register themselves; see ops.cpp. Plain C, limited API of Python 3.10, multi-phase init.
//
// Arrays come as addresses (numpy's array.ctypes.data), because the buffer protocol joined the limited API in 3.11. So
// these functions are for moe_ext.data alone, which owns the arrays, knows their dtype and size, and keeps them alive.
// Bad values raise ValueError with a sentence; a number that does not fit 64 bits raises OverflowError.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include "cuda.h"
#include "memory.h"
#include "moe.h"

static PyObject *checked(int status, const char *function) {
    if (status == MOE_OK) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "%s: %s", function, moe_status_text(status));
}

#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "gcc " __VERSION__
#endif

// "O&" converters.
static int to_u64(PyObject *object, void *out) {
    *(uint64_t *)out = PyLong_AsUnsignedLongLong(object);
    return !PyErr_Occurred();
}
static int to_address(PyObject *object, void *out) {
    *(void **)out = PyLong_AsVoidPtr(object);
    return !PyErr_Occurred();
}

PyDoc_STRVAR(versions_doc,
    "versions() -> {'compiler', 'isa', 'api'}: the C compiler of this binary, the kernels that run on this CPU\n"
    "(MOE_ISA in the environment forces one: base, avx2, avx512, avx512bf16, amx), the Python ABI.");
static PyObject *versions(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return Py_BuildValue("{s:s,s:s,s:s}", "compiler", COMPILER, "isa", moe_isa(), "api", "cp310-abi3");
}

PyDoc_STRVAR(cpu_features_doc,
    "cpu_features() -> {name: bool}: the instruction sets that decide which kernels can run.");
static PyObject *cpu_features(PyObject *module, PyObject *none) {
    (void)module, (void)none;
#ifdef __x86_64__
    const struct { const char *name; int has; } features[] = {
#define FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
        FEATURE("avx2"),     FEATURE("fma"),      FEATURE("f16c"),       FEATURE("avx512f"),  FEATURE("avx512bw"),
        FEATURE("avx512vl"), FEATURE("avx512dq"), FEATURE("avx512bf16"), FEATURE("amx-tile"), FEATURE("amx-bf16"),
#undef FEATURE
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof features / sizeof *features; i++)
        if (PyDict_SetItemString(dict, features[i].name, features[i].has ? Py_True : Py_False)) Py_CLEAR(dict);
    return dict;
#else
    return PyDict_New();
#endif
}

PyDoc_STRVAR(empty_cache_doc,
    "empty_cache(): gives the memory that is kept for the next tensors on the CPU back to the system.");
static PyObject *empty_cache(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    moe_memory_release();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(memory_peak_doc,
    "memory_peak() -> the most bytes of tensors that this memory held at once since the last call. torch's profiler does\n"
    "not see them.");
static PyObject *memory_peak(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return PyLong_FromLongLong(moe_memory_peak());
}

PyDoc_STRVAR(cuda_doc, "cuda() -> None if the CUDA kernels of this build can be loaded, else why not.");
static PyObject *cuda(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    const char *why;
    if (moe_cuda_find(&why)) Py_RETURN_NONE;
    return PyUnicode_FromString(why);
}

// "O&": a dtype of document and sample numbers, given as its bytes.
static int to_number(PyObject *object, void *out) {
    const long bytes = PyLong_AsLong(object);
    *(int *)out = bytes == 4 ? MOE_I32 : MOE_I64;
    if (!PyErr_Occurred() && bytes != 4 && bytes != 8)
        PyErr_Format(PyExc_ValueError, "got numbers of %ld bytes, wanted 4 (int32) or 8 (int64)", bytes);
    return !PyErr_Occurred();
}

PyDoc_STRVAR(shuffle_doc,
    "shuffle(bytes, seed, stream, n, order): writes a permutation of 0..n-1, a function of (seed, stream, n), to the\n"
    "array of n integers of `bytes` bytes (4 or 8) at address order.");
static PyObject *shuffle(PyObject *module, PyObject *args) {
    (void)module;
    uint64_t  seed;
    long long stream, n;
    void     *order;
    int       dtype, status;
    if (!PyArg_ParseTuple(args, "O&O&LLO&:shuffle", to_number, &dtype, to_u64, &seed, &stream, &n, to_address, &order))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = moe_shuffle(dtype, seed, stream, n, order);
    Py_END_ALLOW_THREADS
    return checked(status, "shuffle");
}

PyDoc_STRVAR(sample_index_doc,
    "sample_index(bytes, docs_n, docs, sizes_n, sizes, length, samples, doc, offset): the documents docs (docs_n\n"
    "integers of `bytes` bytes, each an index into sizes) are laid end to end; sizes (int32, sizes_n) are in tokens.\n"
    "Sample i is the length + 1 tokens from token i*length on, and begins in document docs[doc[i]] at token offset[i]:\n"
    "arrays of `samples` elements that this function writes, doc of `bytes` bytes each, offset int32. Arrays are given\n"
    "by address.");
static PyObject *sample_index(PyObject *module, PyObject *args) {
    (void)module;
    long long docs_n, sizes_n, length, samples;
    void     *docs, *sizes, *doc, *offset;
    int       dtype, status;
    if (!PyArg_ParseTuple(args, "O&LO&LO&LLO&O&:sample_index", to_number, &dtype, &docs_n, to_address, &docs, &sizes_n,
                          to_address, &sizes, &length, &samples, to_address, &doc, to_address, &offset)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = moe_sample_index(dtype, docs_n, docs, sizes_n, sizes, length, samples, doc, offset);
    Py_END_ALLOW_THREADS
    if (status == MOE_BAD_SHAPE)
        return PyErr_Format(PyExc_ValueError,
                            "sample_index: got %lld samples of length %lld, wanted samples >= 0, length >= 1 and "
                            "samples * length + 1 tokens in the documents: ask for fewer samples or repeat documents",
                            samples, length);
    return checked(status, "sample_index");
}

PyDoc_STRVAR(blend_doc,
    "blend(sets, weights, first, rows, taken, set, row): rows [first, first + rows) of a mixture of data sets, whose\n"
    "float64 weights sum to 1: row r is row row[r] (int64) of set[r] (int32). taken (int64, sets): the rows of each set\n"
    "before `first`, moved on by this call. Arrays are given by address.");
static PyObject *blend(PyObject *module, PyObject *args) {
    (void)module;
    long long sets, first, rows;
    void     *weights, *taken, *set, *row;
    int       status;
    if (!PyArg_ParseTuple(args, "LO&LLO&O&O&:blend", &sets, to_address, &weights, &first, &rows, to_address, &taken,
                          to_address, &set, to_address, &row)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = moe_blend(sets, weights, first, rows, taken, set, row);
    Py_END_ALLOW_THREADS
    return checked(status, "blend");
}

PyDoc_STRVAR(samples_doc,
    "samples(bytes, token_bytes, tokens, starts_n, starts, docs_n, docs, rows, doc, offset, length, out, documents):\n"
    "row r of out is `length` tokens of token_bytes bytes each, from token offset[r] (int64) of document docs[doc[r]]\n"
    "(int64) on, through the documents that follow in docs (docs_n integers of `bytes` bytes); document d is\n"
    "tokens[starts[d]:starts[d+1]] (int64, starts_n). documents (int32): the number of each token's document within\n"
    "its row, from 0. Arrays are given by address; out 0: not wanted.");
static PyObject *samples(PyObject *module, PyObject *args) {
    (void)module;
    long long token_bytes, starts_n, docs_n, rows, length;
    void     *tokens, *starts, *docs, *doc, *offset, *out, *documents;
    int       dtype, status;
    if (!PyArg_ParseTuple(args, "O&LO&LO&LO&LO&O&LO&O&:samples", to_number, &dtype, &token_bytes, to_address, &tokens,
                          &starts_n, to_address, &starts, &docs_n, to_address, &docs, &rows, to_address, &doc,
                          to_address, &offset, &length, to_address, &out, to_address, &documents)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = moe_samples(dtype, token_bytes, tokens, starts_n, starts, docs_n, docs, rows, doc, offset, length, out,
                         documents);
    Py_END_ALLOW_THREADS
    return checked(status, "samples");
}

static PyMethodDef methods[] = {
    {"versions", versions, METH_NOARGS, versions_doc},
    {"cpu_features", cpu_features, METH_NOARGS, cpu_features_doc},
    {"empty_cache", empty_cache, METH_NOARGS, empty_cache_doc},
    {"memory_peak", memory_peak, METH_NOARGS, memory_peak_doc},
    {"cuda", cuda, METH_NOARGS, cuda_doc},
    {"shuffle", shuffle, METH_VARARGS, shuffle_doc},
    {"sample_index", sample_index, METH_VARARGS, sample_index_doc},
    {"blend", blend, METH_VARARGS, blend_doc},
    {"samples", samples, METH_VARARGS, samples_doc},
    {NULL, NULL, 0, NULL},
};

// Kernels are chosen at import, so that a wrong MOE_ISA ends there with a sentence.
static int execute(PyObject *module) {
    (void)module;
    int status = moe_init();
    if (status == MOE_OK) return 0;
    PyErr_SetString(PyExc_ImportError, moe_status_text(status));
    return -1;
}

// A slot holds a function as void *, which ISO C does not convert but POSIX promises: hence __extension__.
static PyModuleDef_Slot slots[] = {{Py_mod_exec, __extension__(void *)execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name    = "_C",
    .m_doc     = "The C core of moe_ext.",
    .m_methods = methods,
    .m_slots   = slots,
};

PyMODINIT_FUNC PyInit__C(void);
PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
