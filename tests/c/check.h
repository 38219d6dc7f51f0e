// check.h: what every C test of the core uses: checks that count, numbers that repeat, memory that shows who forgot to
// write it, and a pool of real threads (so that ThreadSanitizer has something to look at).
//
// A test file is a set of void functions and
//     static void tests(void) { test_this(); test_that(); }
//     int main(void) { return check_main(tests); }
// which runs under the instruction set that MOE_ISA names, or the best one.
#ifndef CHECK_H
#define CHECK_H
#include "kernels.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_failures, check_count;

// CHECK(condition, "what was seen", values...): prints the first 20 failures, counts all.
#define CHECK(ok, ...)                                                                                                 \
    do {                                                                                                               \
        check_count++;                                                                                                 \
        if (!(ok) && check_failures++ < 20) {                                                                          \
            fprintf(stderr, "%s:%d (%s): %s: ", __FILE__, __LINE__, moe_k ? moe_k->isa : "no isa", #ok);               \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)
#define CHECK_STATUS(call, want)                                                                                       \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        CHECK(status_ == (want), "%s is status %d (%s)", #call, status_, moe_status_text(status_));                    \
    } while (0)
#define CHECK_OK(call) CHECK_STATUS(call, MOE_OK)

// |got - want| <= tolerance * (scale of the terms that were summed); NaN never passes.
static inline bool check_near(double got, double want, double tolerance, double scale) {
    return fabs(got - want) <= tolerance * scale;
}

// -- memory -----------------------------------------------------------------------------------------------------------
// 64-byte aligned, exactly n bytes (ASan sees one byte more), filled with 0xff: NaN in every float, -1 in every int.
static inline void *check_alloc(int64_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)(bytes > 0 ? bytes : 1))) abort();
    memset(p, 0xff, (size_t)bytes);
    return p;
}

// -- numbers: splitmix64, the same on every machine -------------------------------------------------------------------
static inline uint64_t check_u64(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
static inline int64_t check_below(uint64_t *state, int64_t n) { return (int64_t)(check_u64(state) % (uint64_t)n); }
static inline double  check_unit(uint64_t *state) { return (double)(check_u64(state) >> 11) * 0x1p-53; }     // [0, 1)

static const char *const check_dtype[] = {"f64", "f32", "bf16", "f16", "i16", "i32", "i64"};
// Unit roundoff of storage: |round(x) - x| <= check_eps[dtype] * |x|.
static const double check_eps[] = {0x1p-53, 0x1p-24, 0x1p-8, 0x1p-11};

// x[i] as double, by a decoder that shares nothing with rows.inc.
static inline double check_get(int dtype, const void *x, int64_t i) {
    if (dtype == MOE_F64) return ((const double *)x)[i];
    if (dtype == MOE_F32) return ((const float *)x)[i];
    uint16_t h        = ((const uint16_t *)x)[i];
    int      mantissa = dtype == MOE_BF16 ? 7 : 10, bias = dtype == MOE_BF16 ? 127 : 15;
    int      fraction = h & ((1 << mantissa) - 1), exponent = (h & 0x7fff) >> mantissa, top = 0x7fff >> mantissa;
    double   size     = exponent == top ? (fraction ? (double)NAN : (double)INFINITY)
                      : exponent == 0   ? ldexp(fraction, 1 - bias - mantissa)
                                        : ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
    return h & 0x8000 ? -size : size;
}

// n numbers of dtype in [-1, 1).
static inline void *check_floats(int dtype, int64_t n, uint64_t seed) {
    void *x = check_alloc(n * moe_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        double d = 2 * check_unit(&seed) - 1;
        float  f = (float)d;
        moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&d : (void *)&f, (char *)x + i * moe_size(dtype));
    }
    return x;
}

// -- threads: one per piece, as a parallel region of torch cuts its range ---------------------------------------------
static int check_threads = 1;
typedef struct { int64_t begin, end; moe_body body; void *arg; } check_piece;

static inline int check_thread_count(void) { return check_threads; }
static inline void *check_run_piece(void *p) {
    check_piece *piece = p;
    piece->body(piece->begin, piece->end, piece->arg);
    return NULL;
}
static inline int32_t check_pool(int64_t begin, int64_t end, int64_t grain, moe_body body, void *arg) {
    enum { MAX = 16 };
    pthread_t   thread[MAX];
    check_piece piece[MAX];
    int64_t     share = (end - begin + check_threads - 1) / check_threads;
    int         n     = 0;
    if (share < grain) share = grain;
    for (; begin < end; begin += share, n++) {
        piece[n] = (check_piece){begin, begin + share < end ? begin + share : end, body, arg};
        if (pthread_create(&thread[n], NULL, check_run_piece, &piece[n])) abort();
    }
    while (n--) pthread_join(thread[n], NULL);
    return 0;
}

// -- main -------------------------------------------------------------------------------------------------------------
static inline int check_main(void (*tests)(void)) {
    CHECK_OK(moe_init());
    moe_set_pool(check_pool, check_thread_count);
    if (moe_k) tests();
    printf("%d checks, %d failed\n", check_count, check_failures);
    return check_failures != 0;
}
#endif
