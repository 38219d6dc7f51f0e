// test_count.c: how many instructions the hot loops take, so that a loop that lost its vectors, spills its sums or
// calls something in its middle shows without a clock. A child runs the loop one instruction at a time and its parent
// counts: exact, and the same on a loaded machine. What a unit costs is the difference of two lengths, which leaves out
// all that surrounds the loop.
//
// `recorded` is instructions per unit, by gcc 12, of each table; 0: the loop is libm's. avx512's are avx2's, a bound,
// but for the products, which were counted in its assembly. Another compiler may take up to `most` times as many: 1.25,
// which any loop exceeds that lost its vectors; the products 1.06, which a spill of one sum in each step exceeds.
#include "check.h"
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BASE, AVX2, AVX512, TABLES };
enum { FLOATS = 1 << 15 };
static char   *x, *y, *z, *stage;
static int32_t index_n[256];

// -- the loops: n units each ------------------------------------------------------------------------------------------
static void product(gemm_kind kind, int64_t k) {
    const moe_gemm *g = &moe_k->gemm[kind];
    g->run(g->mr, k, x, y, z, g->nr, true);
}
static void product_f32(int64_t n) { product(GEMM_F32, n); }
static void product_f64(int64_t n) { product(GEMM_F64, n); }

// Rows that fill panels of A, and panels of B.
static int64_t panels(void) { return moe_k->gemm[GEMM_F32].mr * moe_k->gemm[GEMM_F32].nr / 2; }
static void pack(bool a, int dtype, bool along_k, bool by_index, int64_t k) {
    const moe_gemm *g = &moe_k->gemm[GEMM_F32];
    const gemm_factor f = {dtype, x, along_k ? 64 : 1, along_k ? 1 : panels(), by_index ? index_n : NULL, 1, !along_k};
    (a ? g->pack_a : g->pack_b)(&f, 0, panels(), 0, k, stage, z);
}
static void pack_a_along_k(int64_t n)      { pack(true, MOE_F32, true, false, n); }
static void pack_a_along_i(int64_t n)      { pack(true, MOE_F32, false, false, n); }
static void pack_a_rows(int64_t n)         { pack(true, MOE_F32, true, true, n); }
static void pack_b_along_k(int64_t n)      { pack(false, MOE_F32, true, false, n); }
static void pack_b_along_i(int64_t n)      { pack(false, MOE_F32, false, false, n); }
static void pack_b_steps(int64_t n)        { pack(false, MOE_F32, false, true, n); }
static void pack_a_bf16_along_k(int64_t n) { pack(true, MOE_BF16, true, false, n); }
static void pack_b_bf16_along_i(int64_t n) { pack(false, MOE_BF16, false, false, n); }

static const float  weights[2] = {0.5f, 0.25f};
static const void  *rows[2];
static void load_bf16(int64_t n)  { moe_k->load(MOE_BF16, n, x, z); }
static void store_bf16(int64_t n) { moe_k->store(MOE_BF16, n, x, z); }
static void axpy_bf16(int64_t n)  { moe_k->axpy(MOE_BF16, n, 0.5, x, z); }
static void sum_bf16(int64_t n)   { moe_k->sum(MOE_BF16, n, 2, weights, rows, z); }
static void dot_bf16(int64_t n)   { moe_k->dot(MOE_BF16, n, x, y); }
static void swiglu(int64_t n)     { moe_k->act(false, MOE_SWIGLU, n, x, y, z); }
static void dswiglu(int64_t n)    { moe_k->dact(false, MOE_SWIGLU, n, x, y, x, z, stage); }

// A unit is a step of the sum for the products, else an element.
static const struct {
    const char *name;
    void      (*run)(int64_t n);
    int64_t     n;
    bool        packs;                          // n steps of panels() rows
    double      most, recorded[TABLES];
} loops[] = {
    {"product f32, a step",    product_f32,         32, false, 1.06, {  34,   25,   49}},
    {"product f64, a step",    product_f64,         32, false, 1.06, {  34,   25,   49}},
    {"pack A along k",         pack_a_along_k,      32, true,  1.25, {1.44, 1.00, 1.00}},
    {"pack A along i",         pack_a_along_i,      32, true,  1.25, {2.76, 1.92, 1.92}},
    {"pack A, rows by index",  pack_a_rows,         32, true,  1.25, {1.44, 1.00, 1.00}},
    {"pack B along k",         pack_b_along_k,      32, true,  1.25, {1.44, 0.75, 0.75}},
    {"pack B along i",         pack_b_along_i,      32, true,  1.25, {1.96, 0.82, 0.82}},
    {"pack B, steps by index", pack_b_steps,        32, true,  1.25, {2.23, 0.93, 0.93}},
    {"pack A, bf16 along k",   pack_a_bf16_along_k, 32, true,  1.25, {4.19, 1.75, 1.75}},
    {"pack B, bf16 along i",   pack_b_bf16_along_i, 32, true,  1.25, {3.36, 0.89, 0.89}},
    {"load bf16",              load_bf16,           64, false, 1.25, {2.75, 0.75, 0.75}},
    {"store bf16",             store_bf16,          64, false, 1.25, {6.00, 2.00, 2.00}},
    {"axpy bf16",              axpy_bf16,           64, false, 1.25, {   0, 0.88, 0.88}},
    {"sum of two, bf16",       sum_bf16,            64, false, 1.25, {   0, 3.13, 3.13}},
    {"dot bf16",               dot_bf16,            64, false, 1.25, {   0, 0.82, 0.82}},
    {"swiglu",                 swiglu,              64, false, 1.25, {  55, 5.13, 5.13}},
    {"swiglu backward",        dswiglu,             64, false, 1.25, {  66, 6.00, 6.00}},
};

// -- counting ---------------------------------------------------------------------------------------------------------
// The instructions of run(n) and of what surrounds it; -1 if a process may not trace its child here.
static int64_t count(void (*run)(int64_t n), int64_t n) {
    const pid_t child = fork();
    if (child < 0) abort();
    if (child == 0) {
        run(n);                                 // the linker resolves what it calls on the first call
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) _exit(1);
        raise(SIGSTOP);
        run(n);
        raise(SIGSTOP);
        _exit(0);
    }
    int status;
    int64_t steps = -1;                         // 0 at the first SIGSTOP
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
        if (WSTOPSIG(status) == SIGSTOP && steps >= 0) break;
        steps++;
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL)) break;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return steps;
}

static void tests(void) {
    const int table = !strcmp(moe_k->isa, "base") ? BASE : !strcmp(moe_k->isa, "avx2") ? AVX2 : AVX512;
    x = check_floats(MOE_F32, FLOATS, 1), y = check_floats(MOE_F32, FLOATS, 2);
    z = check_alloc(FLOATS * 4), stage = check_alloc(FLOATS * 4);
    rows[0] = x, rows[1] = y;
    for (int i = 0; i < 256; i++) index_n[i] = i * 7 % 64;
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++) {
        const int64_t n = loops[i].n, once = count(loops[i].run, n), twice = count(loops[i].run, 2 * n);
        if (once < 0 || twice < 0) {
            printf("SKIPPED: a process may not trace its child here\n");
            break;
        }
        const double recorded = loops[i].recorded[table];
        const double cost = (double)(twice - once) / (double)(n * (loops[i].packs ? panels() : 1));
        printf("%-24s %7.3f instructions, recorded %7.3f\n", loops[i].name, cost, recorded);
        CHECK(!recorded || cost <= loops[i].most * recorded, "%s: %.3f instructions, recorded %.3f", loops[i].name, cost,
              recorded);
    }
    free(x), free(y), free(z), free(stage);
}
int main(void) {
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    return check_main(tests);
#else
    (void)tests;
    printf("SKIPPED: recorded for the code that runs on x86-64, without sanitizers\n");
    return 0;
#endif
}
