// xent.c: the softmax pass of a chunked linear + cross-entropy.
//
//   lse_m = logsumexp(logits[m])     loss_m = lse_m - logits[m, target_m]
//   logits[m,v] := dlogits[m,v] = grad_scale * (exp(logits[m,v] - lse_m) - [v == target_m])
//
// logits_MV: row-major, any floating dtype, overwritten. loss_M, lse_M: real. A row whose target is ignore_index gets
// zeros in all three. A row may mask logits with -inf; NaN, +inf or a row of nothing but -inf gives NaN.
// A row passes twice through an L1 tile of reals: its softmax is the tile's, times the tile's share of the row. A row of
// reals keeps the tiles' softmax in its own place; one of halves, or of more than TILE * TILES, computes it again. Rows
// are independent.
#include "real.h"
#include <math.h>
#include <string.h>

enum { TILE = REAL_TILE, TILES = 256 };

typedef struct {
    int            dtype;
    int64_t        V, ignore_index;
    double         grad_scale;
    const int64_t *targets_M;
    char          *logits_MV;
    void          *loss_M, *lse_M;
} xent_job;

// log(exp(a) + exp(b))
static double log_add(double a, double b) {
    if (a == -INFINITY) return b;               // else -inf twice would be NaN
    return fmax(a, b) + log1p(exp(-fabs(a - b)));
}

static void xent_rows(int64_t begin, int64_t end, void *arg) {
    const xent_job *job = arg;
    const int dtype = job->dtype, real = dtype == MOE_F64 ? MOE_F64 : MOE_F32;
    const int64_t V = job->V, size = moe_size(dtype);
    const bool in_place = dtype == real && V <= TILE * TILES;
    real_tile tile;
    double parts[TILES];
    for (int64_t m = begin; m < end; m++) {
        char *row = job->logits_MV + m * V * size;
        const int64_t target = job->targets_M[m];
        if (target == job->ignore_index) {
            memset(row, 0, (size_t)(V * size));
            real_set(dtype, job->loss_M, m, 0);
            real_set(dtype, job->lse_M, m, 0);
            continue;
        }
        moe_k->load(dtype, 1, row + target * size, &tile);
        const double at_target = real_get(dtype, &tile, 0);
        double lse = -INFINITY;
        for (int64_t v = 0; v < V; v += TILE) {
            const int64_t n = V - v < TILE ? V - v : TILE;
            void *p = in_place ? row + v * size : (char *)&tile;
            if (!in_place) moe_k->load(dtype, n, row + v * size, p);
            const double part = moe_k->softmax(dtype == MOE_F64, n, p, p);
            if (in_place) parts[v / TILE] = part;
            lse = log_add(lse, part);
        }
        real_set(dtype, job->loss_M, m, lse - at_target);
        real_set(dtype, job->lse_M, m, lse);

        for (int64_t v = 0; v < V; v += TILE) {
            const int64_t n = V - v < TILE ? V - v : TILE, hit = target - v;
            void *p = in_place ? row + v * size : (char *)&tile;
            if (!in_place) moe_k->load(dtype, n, row + v * size, p);
            const double part = in_place ? parts[v / TILE] : moe_k->softmax(dtype == MOE_F64, n, p, p);
            moe_k->scale(real, n, exp(part - lse), p, p);
            if (hit >= 0 && hit < n) real_set(dtype, p, hit, real_get(dtype, p, hit) - 1);
            if (job->grad_scale != 1) moe_k->scale(real, n, job->grad_scale, p, p);
            if (!in_place) moe_k->store(dtype, n, p, row + v * size);
        }
    }
}

int moe_xent(int dtype, int64_t M, int64_t V, int64_t ignore_index, double grad_scale, const int64_t *targets_M,
             void *logits_MV, void *loss_M, void *lse_M) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    if (M < 0 || V < 1 || M > INT64_MAX / 8 / V) return MOE_BAD_SHAPE;
    for (int64_t m = 0; m < M; m++)
        if (targets_M[m] != ignore_index && (targets_M[m] < 0 || targets_M[m] >= V)) return MOE_BAD_INDEX;
    xent_job job = {dtype, V, ignore_index, grad_scale, targets_M, logits_MV, loss_M, lse_M};
    moe_parallel(M, 16384 / V + 1, xent_rows, &job);
    return MOE_OK;
}
