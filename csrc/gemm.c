// gemm.c: grouped matrix products. Rows sorted by expert, one weight per expert, sizes known only at run time.
//
//   moe_grouped_gemm         y_RO[bin e] = x_RI[bin e] w_EIO[e]           ragged rows
//   moe_grouped_gemm_wgrad   dw_EIO[e]   = x_RI[bin e]^T dy_RO[bin e]     ragged sum
//
// The contract of a packed panel (MR and NR belong to the micro-kernel, moe_k->gemm[kind]; k counts steps of the sum):
//
//             NR columns                   GEMM_F32, GEMM_F64, in real:
//         k  +----------+                    a panel of A holds MR rows, k after k:     A[p*MR + i] = a(i, p)
//            | B panel  |  in L1             a panel of B holds NR columns likewise:    B[p*NR + j] = b(j, p)
//            +----------+                  GEMM_BF16, in bf16:
//      k          |                          A is row by row:                           A[i*k + p] = a(i, p)
//    +-----+ +----v-----+                    B in pairs of steps:                     B[(p/2*NR + j)*2 + p%2] = b(j, p)
//    | A   |>| C tile   |  MR rows,
//    |panel| | registers|                  run(rows, k, A, B, C):   C[i,j] (+)= sum_p A(i,p) B(p,j),   i < rows <= MR
//    +-----+ +----------+
//     in L2
//
// Columns that a panel has too many of hold any numbers, and their sums go to a tile that is thrown away; steps are
// filled up with zeros to a multiple of ku. Packing also gathers rows by index, widens 16-bit storage, and turns
// whichever stride is 1 into consecutive loads.
//
// One task computes one piece of one expert's product, alone: [m <= 768] x [columns <= 512], fewer rows for many
// threads. Its loops, outside in:
//   row tiles (L2) > chunks of the sum > panels of B (L1) > panels of A (L2)
// and B stays packed over several row tiles if it fits into BYTES_B. Columns of B that lie in rows of memory are packed
// panel by panel, each while it is in L1, and the products of one ask memory for the rows of the next. Each element is
// one sum in one order, chunk by chunk, whatever the number of threads. Tasks come from a queue; here no task waits for
// another.
#include "gemm.h"
#include <stdatomic.h>
#include <string.h>

enum {
    TASK_ROWS = 768,            // the most rows of a task: packing B is amortised
    LEAST_TASK = 128,           // the fewest, where threads would have no work: a tenth of the time goes into packing B
    TASKS     = 4,              // for each thread, at the least, so that they end at about the same time
    LEAST_TILE = 96,            // rows of a tile; the most are TASK_ROWS
    CHUNK     = 256,            // steps, 512 of bf16: a panel of B and two of A in L1, of 32 KiB (avx2), of 48 (avx512)
    CHUNK_UNIT = 32,            // of a chunk's length: a multiple of every ku
    LINE      = 64,             // bytes
    BYTES_B   = 4 << 20,        // 512 columns of a sum of 2048 floats; [256 x NR] at a time comes from L3 to L1
};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// The size of n cut into as few pieces of at most `most` as possible, evenly, in multiples of `unit`.
static int64_t even(int64_t n, int64_t most, int64_t unit) {
    return n > 0 ? round_up(ceil_div(n, ceil_div(n, most)), unit) : unit;
}

static int64_t real_size(gemm_kind kind) { return kind == GEMM_F64 ? 8 : 4; }                              // of C
static int64_t panel_size(gemm_kind kind) { return kind == GEMM_F64 ? 8 : kind == GEMM_F32 ? 4 : 2; }      // of A and B

// Steps of the sum that are packed together, the most. They decide the order of additions, and so the bits.
static int64_t chunk_of(gemm_kind kind) { return kind == GEMM_BF16 ? 2 * CHUNK : CHUNK; }

// Rows of A that are packed together: 3/8 of L2 (192 rows of floats in 512 KiB); B and C pass through the rest.
static int64_t tile_rows(gemm_kind kind) {
    const int64_t fit = moe_l2 * 3 / 8 / (chunk_of(kind) * panel_size(kind));
    return fit < LEAST_TILE ? LEAST_TILE : min64(fit, TASK_ROWS);
}

// -- scratch of one thread: sizes and carving in one struct ----------------------------------------------------------
typedef struct { int64_t a, b, c, edge, stage, size; } scratch_map;
static scratch_map scratch_layout(gemm_kind kind) {
    const int64_t real = real_size(kind), panel = panel_size(kind), rows = tile_rows(kind) + GEMM_MAX_MR;
    const int64_t columns = 2 * (GEMM_COLUMNS + GEMM_MAX_NR);
    scratch_map s = {0};
    s.b     = s.a     + panel * rows * chunk_of(kind);
    s.c     = s.b     + BYTES_B + panel * chunk_of(kind) * columns;
    s.edge  = s.c     + real * rows * columns;
    s.stage = s.edge  + real * GEMM_MAX_MR * GEMM_MAX_NR;
    s.size  = s.stage + real * GEMM_STAGE * columns;
    return s;
}
int64_t gemm_scratch_size(gemm_kind kind) { return gemm_align(scratch_layout(kind).size); }

// Fewer columns for a long sum, as long as that keeps B packed over the row tiles.
int64_t gemm_columns(gemm_kind kind, int64_t n, int64_t k, int parts) {
    const int64_t nr = moe_k->gemm[kind].nr, fit = BYTES_B / (panel_size(kind) * (k > 0 ? k : 1));
    const int64_t most = GEMM_COLUMNS / parts / nr * nr, least = most / 2 / nr * nr;
    return even(n, fit >= most * parts || fit < least * parts ? most : round_up(fit / parts - nr + 1, nr), nr);
}

// -- one task --------------------------------------------------------------------------------------------------------
// The rows of memory that the next packing of B reads: asked for from now on, some lines with each run of the kernel.
typedef struct { const char *row; int64_t stride, bytes, at, lines; } ahead;

static ahead look_ahead(const gemm_factor *f, int64_t i0, int64_t m, int64_t k0, int64_t n) {
    if (f->sk != 1 || f->index) return (ahead){0};
    const int64_t size = moe_size(f->dtype);
    return (ahead){f->p + (i0 * f->si + k0) * size, f->si * size, n * size, 0, m * ceil_div(n * size, LINE)};
}
static void ask(ahead *next, int64_t lines) {
    for (; lines > 0 && next->lines > 0; lines--, next->lines--) {
        __builtin_prefetch(next->row + next->at, 0, 2);                 // to L2
        if ((next->at += LINE) >= next->bytes) next->row += next->stride, next->at = 0;
    }
}

// C[rows, n] (+)= A B over one chunk of the sum; panels of B outside, so that each is read from L1 by all panels of A.
static void multiply_panels(gemm_kind kind, int64_t rows, int64_t n, int64_t k, const char *a, const char *b,
                            char *c, int64_t ldc, bool accumulate, char *edge, ahead next) {
    const moe_gemm *const gemm = &moe_k->gemm[kind];
    const int64_t real = real_size(kind), panel = k * panel_size(kind), mr = gemm->mr, nr = gemm->nr;
    const int64_t share = ceil_div(next.lines, ceil_div(n, nr) * ceil_div(rows, mr));
    for (int64_t j = 0; j < n; j += nr)
        for (int64_t i = 0; i < rows; i += mr) {
            char *to = c + (i * ldc + j) * real;
            const int64_t height = min64(mr, rows - i), width = min64(nr, n - j);
            for (int64_t r = 0; r < height; r++) __builtin_prefetch(to + r * ldc * real, 1);    // needed after the sum
            ask(&next, share);
            if (width == nr) {
                gemm->run(height, k, a + i * panel, b + j * panel, to, ldc, accumulate);
                continue;
            }
            for (int64_t r = 0; accumulate && r < height; r++)
                memcpy(edge + r * nr * real, to + r * ldc * real, (size_t)(width * real));
            gemm->run(height, k, a + i * panel, b + j * panel, edge, nr, accumulate);
            for (int64_t r = 0; r < height; r++)
                memcpy(to + r * ldc * real, edge + r * nr * real, (size_t)(width * real));
        }
}

void gemm_multiply(const gemm_product *g, void *scratch) {
    const moe_gemm *const gemm = &moe_k->gemm[g->kind];
    const int64_t real = real_size(g->kind), size = panel_size(g->kind), mr = gemm->mr, nr = gemm->nr;
    const scratch_map at = scratch_layout(g->kind);
    char *const s = scratch, *const a = s + at.a, *const edge = s + at.edge, *const stage = s + at.stage;
    const int64_t part = round_up(g->n, nr), columns = g->parts * part, padded = round_up(g->k, gemm->ku);
    const int64_t tile = even(g->m, tile_rows(g->kind), mr), chunk = even(g->k, chunk_of(g->kind), CHUNK_UNIT);
    const bool keep_b = g->m > tile && columns * padded * size <= BYTES_B;          // over the row tiles
    if (gemm->begin) gemm->begin();
    for (int64_t i = 0; i < g->m; i += tile) {
        const int64_t rows = min64(tile, g->m - i), ldc = g->c ? g->ldc : columns;
        char *const c = g->c ? (char *)g->c + i * ldc * real : s + at.c;
        int64_t k = 0;
        do {                                            // once even for an empty sum, which writes zeros
            const int64_t n = min64(chunk, g->k - k), steps = round_up(n, gemm->ku);
            char *const b = s + at.b + (keep_b ? k * columns * size : 0);
            const bool accumulate = k > 0 || g->accumulate, pack_b = i == 0 || !keep_b;
            const int64_t next_k = k + chunk < g->k ? k + chunk : 0, next_n = min64(chunk, g->k - next_k);
            const bool again = next_k ? pack_b : !keep_b && i + tile < g->m;            // B is packed after this chunk
            gemm->pack_a(&g->a, i, rows, k, n, stage, a);
            for (int q = 0; q < g->parts; q++) {
                const gemm_factor *const b_q = &g->b[q];
                char *const c_q = c + q * part * real;
                const int64_t at_once = pack_b && b_q->sk == 1 ? nr : part;
                for (int64_t j = 0; j < g->n; j += at_once) {
                    const int64_t width = min64(at_once, g->n - j);
                    char *const packed = b + (keep_b ? (q * part + j) * steps * size : 0);
                    const int64_t next_j = j + at_once;
                    ahead next = {0};
                    if (pack_b && next_j < g->n) next = look_ahead(b_q, next_j, min64(at_once, g->n - next_j), k, n);
                    else if (pack_b && q + 1 < g->parts) next = look_ahead(b_q + 1, 0, min64(at_once, g->n), k, n);
                    else if (again) next = look_ahead(g->b, 0, min64(at_once, g->n), next_k, next_n);
                    if (pack_b) gemm->pack_b(b_q, j, width, k, n, stage, packed);
                    multiply_panels(g->kind, rows, width, steps, a, packed, c_q + j * real, ldc, accumulate, edge,
                                    next);
                }
            }
            k += chunk;
        } while (k < g->k);
        if (!g->c) g->emit(g, i, rows, c, ldc, part);
    }
    if (gemm->end) gemm->end();
}

// -- tasks -----------------------------------------------------------------------------------------------------------
static int64_t grid_begin(const gemm_grid *grid, int64_t e) { return e ? grid->bins_E[e - 1] : 0; }
static int64_t grid_rows(const gemm_grid *grid, int64_t e) {
    return grid->fixed_rows < 0 ? grid->bins_E[e] - grid_begin(grid, e) : grid->fixed_rows;
}
void gemm_share(gemm_grid *grid) {
    const int64_t rows = grid->fixed_rows < 0 ? grid_begin(grid, grid->E) : grid->E * grid->fixed_rows;
    const int64_t share = rows * ceil_div(grid->n, grid->columns) / (TASKS * moe_threads());
    grid->task_rows = moe_threads() == 1 || share > TASK_ROWS ? TASK_ROWS : share < LEAST_TASK ? LEAST_TASK : share;
}
int64_t gemm_grid_tasks_of(const gemm_grid *grid, int64_t e) {
    return ceil_div(grid_rows(grid, e), grid->task_rows) * ceil_div(grid->n, grid->columns);
}
int64_t gemm_grid_tasks(const gemm_grid *grid) {
    int64_t tasks = 0;
    for (int64_t e = 0; e < grid->E; e++) tasks += gemm_grid_tasks_of(grid, e);
    return tasks;
}
gemm_task gemm_grid_task(const gemm_grid *grid, int64_t task) {
    const int64_t across = ceil_div(grid->n, grid->columns);
    int64_t e, piece = task / across;
    for (int64_t i = 0;; i++) {
        e = grid->order_E ? grid->order_E[i] : i;
        const int64_t pieces = ceil_div(grid_rows(grid, e), grid->task_rows);
        if (piece < pieces) break;
        piece -= pieces;
    }
    const int64_t begin = grid_begin(grid, e);
    const int64_t rows = grid_rows(grid, e), size = ceil_div(rows, ceil_div(rows, grid->task_rows));
    gemm_task t = {e, begin, grid->bins_E[e], piece * size, 0, task % across * grid->columns, 0};
    t.m = min64(size, rows - t.i);
    t.n = min64(grid->columns, grid->n - t.j);
    return t;
}

typedef struct {
    gemm_body      body;
    const void    *arg;
    char          *scratch;
    int64_t        scratch_size, n;
    _Atomic int64_t next;
} queue;
static void work(int64_t begin, int64_t end, void *arg) {
    (void)end;                                          // serial pool: the first worker does all the work
    queue *q = arg;
    for (int64_t task; (task = atomic_fetch_add(&q->next, 1)) < q->n;)
        q->body(q->arg, task, q->scratch + begin * q->scratch_size);
}
void gemm_run(int64_t n, gemm_body body, const void *arg, void *scratch, int64_t scratch_size) {
    queue q = {body, arg, scratch, scratch_size, n, 0};
    moe_parallel(min64(n, moe_threads()), 1, work, &q);
}

// -- y = x w ---------------------------------------------------------------------------------------------------------
typedef struct { int dtype; gemm_grid grid; int64_t I, O; const char *x; moe_mat w; char *y; } forward_job;

static void emit_rows(const gemm_product *g, int64_t i0, int64_t rows, void *c, int64_t ldc, int64_t part) {
    (void)part;
    const forward_job *job = g->job;
    const gemm_task *t = g->task;
    for (int64_t r = 0; r < rows; r++)
        moe_k->store(job->dtype, t->n, (const char *)c + r * ldc * moe_real_size(job->dtype),
                     job->y + ((t->begin + t->i + i0 + r) * job->O + t->j) * moe_size(job->dtype));
}
static void forward_tile(const void *arg, int64_t task, void *scratch) {
    const forward_job *job = arg;
    const gemm_task t = gemm_grid_task(&job->grid, task);
    const int64_t size = moe_size(job->dtype), row = t.begin + t.i;
    const moe_mat w = job->w;
    gemm_product g = {
        .kind = moe_gemm_kind(job->dtype), .m = t.m, .n = t.n, .k = job->I, .parts = 1,
        .a = {job->dtype, job->x + row * job->I * size, .si = job->I, .sk = 1},
        .b = {{job->dtype, (char *)w.p + (t.e * w.se + t.j * w.sc) * size, .si = w.sc, .sk = w.sr}},
        .emit = emit_rows, .job = job, .task = &t,
    };
    if (size == moe_real_size(job->dtype)) {
        g.c = job->y + (row * job->O + t.j) * size;
        g.ldc = job->O;
    }
    gemm_multiply(&g, scratch);
}

static int check(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const int32_t *bins_E) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    const int64_t most = INT64_MAX / 64;
    if (R < 0 || E < 1 || I < 0 || O < 0) return MOE_BAD_SHAPE;
    if ((I && R > most / I) || (O && R > most / O)) return MOE_BAD_SHAPE;
    if (I && O && (I > most / O || E > most / (I * O))) return MOE_BAD_SHAPE;
    return moe_check_bins(E, R, bins_E);
}

size_t moe_grouped_gemm_workspace(int dtype, int64_t R, int64_t E, int64_t I, int64_t O) {
    (void)R, (void)E, (void)I, (void)O;
    return (size_t)(moe_threads() * gemm_scratch_size(moe_gemm_kind(dtype)));
}
int moe_grouped_gemm(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, moe_mat w_EIO,
                     const int32_t *bins_E, void *workspace, void *y_RO) {
    const int status = check(dtype, R, E, I, O, bins_E);
    if (status != MOE_OK) return status;
    const gemm_kind kind = moe_gemm_kind(dtype);
    forward_job job = {
        dtype, {E, O, gemm_columns(kind, O, I, 1), -1, bins_E, NULL, 0}, I, O, x_RI, w_EIO, y_RO,
    };
    gemm_share(&job.grid);
    gemm_run(gemm_grid_tasks(&job.grid), forward_tile, &job, workspace, gemm_scratch_size(kind));
    const int64_t used = bins_E[E - 1] * O * moe_size(dtype), all = R * O * moe_size(dtype);
    if (all > used) memset((char *)y_RO + used, 0, (size_t)(all - used));
    return MOE_OK;
}

// -- dw = x^T dy -----------------------------------------------------------------------------------------------------
typedef struct { int dtype; gemm_task t; moe_mat dw; } wgrad_out;

static void emit_matrix(const gemm_product *g, int64_t i0, int64_t rows, void *c, int64_t ldc, int64_t part) {
    (void)part;
    const wgrad_out *out = g->job;
    const int64_t size = moe_size(out->dtype), real = moe_real_size(out->dtype), n = out->t.n;
    const moe_mat dw = out->dw;
    for (int64_t r = 0; r < rows; r++) {
        const char *from = (const char *)c + r * ldc * real;
        char *to = (char *)dw.p + (out->t.e * dw.se + (out->t.i + i0 + r) * dw.sr + out->t.j * dw.sc) * size;
        if (dw.sc == 1) moe_k->store(out->dtype, n, from, to);
        else for (int64_t j = 0; j < n; j++) moe_k->store(out->dtype, 1, from + j * real, to + j * dw.sc * size);
    }
}
bool gemm_wgrad_swap(moe_mat dw) { return dw.sc != 1 && dw.sr == 1; }

gemm_grid gemm_wgrad_grid(gemm_kind kind, int64_t E, int64_t I, int64_t O, const int32_t *bins_E, moe_mat dw) {
    const bool swap = gemm_wgrad_swap(dw);
    const int64_t rows = swap ? O : I, n = swap ? I : O;
    return (gemm_grid){E, n, even(n, GEMM_COLUMNS, moe_k->gemm[kind].nr), rows, bins_E, NULL, 0};
}
void gemm_wgrad(int dtype, gemm_task t, gemm_factor a, gemm_factor b, moe_mat dw, void *scratch) {
    if (gemm_wgrad_swap(dw)) {                          // dw^T = b^T a has its rows in one piece
        const gemm_factor f = a;
        a = b, b = f;
        dw = (moe_mat){dw.p, dw.se, dw.sc, dw.sr};
    }
    const int64_t size = moe_size(dtype);
    a.p += t.i * a.si * moe_size(a.dtype);
    b.p += t.j * b.si * moe_size(b.dtype);
    const wgrad_out out = {dtype, t, dw};
    gemm_product g = {
        .kind = moe_gemm_kind(dtype), .m = t.m, .n = t.n, .k = t.end - t.begin, .parts = 1,
        .a = a, .b = {b}, .emit = emit_matrix, .job = &out,
    };
    if (size == moe_real_size(dtype) && dw.sc == 1) {
        g.c = (char *)dw.p + (t.e * dw.se + t.i * dw.sr + t.j) * size;
        g.ldc = dw.sr;
    }
    gemm_multiply(&g, scratch);
}

typedef struct { int dtype; gemm_grid grid; int64_t I, O; const char *x, *dy; moe_mat dw; } wgrad_job;

static void wgrad_tile(const void *arg, int64_t task, void *scratch) {
    const wgrad_job *job = arg;
    const gemm_task t = gemm_grid_task(&job->grid, task);
    const int64_t size = moe_size(job->dtype);
    const gemm_factor x  = {job->dtype, job->x  + t.begin * job->I * size, .si = 1, .sk = job->I};
    const gemm_factor dy = {job->dtype, job->dy + t.begin * job->O * size, .si = 1, .sk = job->O};
    gemm_wgrad(job->dtype, t, x, dy, job->dw, scratch);
}
size_t moe_grouped_gemm_wgrad_workspace(int dtype, int64_t R, int64_t E, int64_t I, int64_t O) {
    return moe_grouped_gemm_workspace(dtype, R, E, I, O);
}
int moe_grouped_gemm_wgrad(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, const void *dy_RO,
                           const int32_t *bins_E, void *workspace, moe_mat dw_EIO) {
    const int status = check(dtype, R, E, I, O, bins_E);
    if (status != MOE_OK) return status;
    const gemm_kind kind = moe_gemm_kind(dtype);
    wgrad_job job = {dtype, gemm_wgrad_grid(kind, E, I, O, bins_E, dw_EIO), I, O, x_RI, dy_RO, dw_EIO};
    gemm_share(&job.grid);
    gemm_run(gemm_grid_tasks(&job.grid), wgrad_tile, &job, workspace, gemm_scratch_size(kind));
    return MOE_OK;
}
