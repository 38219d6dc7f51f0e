// xent.c: the softmax pass of a chunked linear + cross-entropy.
//
//   lse_m = logsumexp(logits[m])     loss_m = lse_m - logits[m, target_m]
//   logits[m,v] := dlogits[m,v] = grad_scale * (exp(logits[m,v] - lse_m) - [v == target_m])
//
// logits_MV: row-major, any floating dtype, overwritten. loss_M, lse_M: real. A row whose target is ignore_index gets
// zeros in all three. A row may mask logits with -inf; NaN, +inf or a row of nothing but -inf gives NaN.
// A row of any length passes twice through an L1 tile of reals: its softmax is the tile's, times the tile's share of
// the row. Rows are independent.
#include "real.h"
#include <math.h>
#include <string.h>

enum { TILE = 1024 };

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
    union { float f32[TILE]; double f64[TILE]; } tile;
    for (int64_t m = begin; m < end; m++) {
        char *row = job->logits_MV + m * V * size;
        const int64_t target = job->targets_M[m];
        if (target == job->ignore_index) {
            memset(row, 0, (size_t)(V * size));
            real_set(dtype, job->loss_M, m, 0);
            real_set(dtype, job->lse_M, m, 0);
            continue;
        }
        double lse = -INFINITY;
        for (int64_t v = 0; v < V; v += TILE) {
            const int64_t n = V - v < TILE ? V - v : TILE;
            moe_k->load(dtype, n, row + v * size, &tile);
            lse = log_add(lse, moe_k->softmax(dtype == MOE_F64, n, &tile, &tile));
        }
        moe_k->load(dtype, 1, row + target * size, &tile);
        real_set(dtype, job->loss_M, m, lse - real_get(dtype, &tile, 0));
        real_set(dtype, job->lse_M, m, lse);

        for (int64_t v = 0; v < V; v += TILE) {
            const int64_t n = V - v < TILE ? V - v : TILE, hit = target - v;
            moe_k->load(dtype, n, row + v * size, &tile);
            const double share = exp(moe_k->softmax(dtype == MOE_F64, n, &tile, &tile) - lse);
            moe_k->scale(real, n, share, &tile, &tile);
            if (hit >= 0 && hit < n) real_set(dtype, &tile, hit, real_get(dtype, &tile, hit) - 1);
            moe_k->scale(real, n, job->grad_scale, &tile, &tile);
            moe_k->store(dtype, n, &tile, row + v * size);
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
