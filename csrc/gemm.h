// gemm.h: one tile of a matrix product on packed panels, and a queue of such tiles. Shared by gemm.c and expert.c.
#ifndef MOE_GEMM_H
#define MOE_GEMM_H
#include "kernels.h"

// c[i, q*stride + j] = sum_k a(i,k) b[q](j,k) for i < m, j < n, and q < parts factors b side by side (gate and up).
typedef struct gemm_product gemm_product;
typedef void (*gemm_emit)(const gemm_product *g, int64_t i0, int64_t rows, void *c, int64_t ldc, int64_t part);
struct gemm_product {
    gemm_kind   kind;
    int64_t     m, n, k;
    int         parts;
    gemm_factor a, b[2];
    void       *c;              // real [m, n], row stride ldc, parts = 1; accumulated into if `accumulate`
    int64_t     ldc;
    bool        accumulate;
    gemm_emit   emit;           // if c is NULL: takes rows i0 .. i0+rows, may spoil them; b[1] begins at column `part`
    const void *job, *task;     // for emit
};
enum { GEMM_COLUMNS = 512 };            // the most columns that one product may have, all parts together
int64_t gemm_scratch_size(gemm_kind kind);               // bytes; 64-byte aligned
void    gemm_multiply(const gemm_product *g, void *scratch);
int64_t gemm_columns(gemm_kind kind, int64_t n, int64_t k, int parts);       // how many columns of b to give to one product

// The tiles of one grouped product: of expert e, [rows x n] cut into pieces. rows: its bin's, or `fixed_rows`.
typedef struct {
    int64_t        E, n, columns, fixed_rows;           // fixed_rows < 0: ragged rows
    const int32_t *bins_E, *order_E;                    // experts in the order of their tasks; NULL: by number
    int64_t        task_rows;                           // the most rows of a task; gemm_share sets it
} gemm_grid;
typedef struct { int64_t e, begin, end, i, m, j, n; } gemm_task;       // copies begin..end; rows i..i+m, columns j..j+n
// Before the tasks are counted, by the caller of gemm_run: pieces for every thread, of any size that decides no bits.
void gemm_share(gemm_grid *grid);
int64_t gemm_grid_tasks(const gemm_grid *grid);
int64_t gemm_grid_tasks_of(const gemm_grid *grid, int64_t e);
gemm_task gemm_grid_task(const gemm_grid *grid, int64_t task);

// Runs body(arg, task, scratch) for every task < n. Idle threads take the next one, in order, so that a task may await
// what those before it do (pool.h). scratch holds one piece per thread.
typedef void (*gemm_body)(const void *arg, int64_t task, void *scratch);
void gemm_run(int64_t n, gemm_body body, const void *arg, void *scratch, int64_t scratch_size);
static inline int64_t gemm_align(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

// dw = a^T b over the rows of one task's expert, written to `dw` (any strides): a(i,k) with i < I, b(j,k) with j < O.
// The grid runs over the factor that is to be the rows of c: gemm_wgrad_swap says whether those are b's.
bool gemm_wgrad_swap(moe_mat dw);
gemm_grid gemm_wgrad_grid(gemm_kind kind, int64_t E, int64_t I, int64_t O, const int32_t *bins_E, moe_mat dw);
void gemm_wgrad(int dtype, gemm_task t, gemm_factor a, gemm_factor b, moe_mat dw, void *scratch);
#endif
