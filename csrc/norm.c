// norm.c: RMSNorm and its backward; a residual addition with the norm behind it; the sum of squares of a tensor.
//
//   r_m = 1 / sqrt(mean_i x[m,i]^2 + eps)        y[m,i] = r_m x[m,i] w[i]
//   dx[m,i] = r_m w[i] dy[m,i] - c_m x[m,i],     c_m = r_m^3 mean_i(dy[m,i] w[i] x[m,i])
//   dw[i] = sum_m r_m x[m,i] dy[m,i]
//
// A row passes through L1 tiles of reals. dw is summed over BLOCK rows in real, over blocks in double: blocks depend on
// R alone, so no result knows the number of threads.
#include "real.h"
#include <math.h>
#include <string.h>

enum { TILE = REAL_TILE, BLOCK = 64, PIECE = 1 << 15 };

typedef struct {
    int         dtype;
    int64_t     R, n;
    double      eps;
    const char *x_Rn, *dy_Rn;
    const void *w_n;            // real
    char       *y_Rn, *dx_Rn;
    void       *r_R;
    char       *dw_Bn;          // real, a row per block
} norm_job;

static const char *at(const void *real, int64_t i, int dtype) { return (const char *)real + i * moe_real_size(dtype); }
static int64_t blocks_of(int64_t R) { return (R + BLOCK - 1) / BLOCK; }

static void norm_rows(int64_t begin, int64_t end, void *arg) {
    const norm_job *job = arg;
    const int dtype = job->dtype;
    const int64_t n = job->n, size = moe_size(dtype);
    real_tile in, out;
    for (int64_t m = begin; m < end; m++) {
        const char *x = job->x_Rn + m * n * size;
        char *y = job->y_Rn + m * n * size;
        real_set(dtype, job->r_R, m, 1 / sqrt(moe_k->dot(dtype, n, x, x) / (double)n + job->eps));
        const double r = real_get(dtype, job->r_R, m);
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            moe_k->norm(dtype == MOE_F64, k, r, real_load(dtype, k, x + i * size, &in), at(job->w_n, i, dtype),
                        real_making(dtype, y + i * size, &out));
            real_made(dtype, k, &out, y + i * size);
        }
    }
}

static void dnorm_blocks(int64_t begin, int64_t end, void *arg) {
    const norm_job *job = arg;
    const int dtype = job->dtype;
    const bool f64 = dtype == MOE_F64;
    const int64_t n = job->n, size = moe_size(dtype), first = begin * BLOCK;
    const int64_t last = end * BLOCK < job->R ? end * BLOCK : job->R;
    real_tile x_tile, dy_tile, dx_tile;
    memset(job->dw_Bn + begin * n * moe_real_size(dtype), 0, (size_t)((end - begin) * n * moe_real_size(dtype)));
    for (int64_t m = first; m < last; m++) {
        const char *x = job->x_Rn + m * n * size, *dy = job->dy_Rn + m * n * size;
        char *dx = job->dx_Rn + m * n * size, *dw = job->dw_Bn + m / BLOCK * n * moe_real_size(dtype);
        const double r = real_get(dtype, job->r_R, m);
        double sum = 0;
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            sum += moe_k->norm_dot(f64, k, real_load(dtype, k, x + i * size, &x_tile), at(job->w_n, i, dtype),
                                   real_load(dtype, k, dy + i * size, &dy_tile));
        }
        const double c = r * r * r * sum / (double)n;
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            moe_k->dnorm(f64, k, r, c, real_load(dtype, k, x + i * size, &x_tile), at(job->w_n, i, dtype),
                         real_load(dtype, k, dy + i * size, &dy_tile), real_making(dtype, dx + i * size, &dx_tile),
                         dw + i * moe_real_size(dtype));
            real_made(dtype, k, &dx_tile, dx + i * size);
        }
    }
}

static int check_norm(int dtype, int wdtype, int64_t R, int64_t n) {
    if (!moe_is_float(dtype) || !moe_is_float(wdtype)) return MOE_BAD_DTYPE;
    if (wdtype != dtype && (dtype == MOE_F64 || wdtype != MOE_F32)) return MOE_BAD_DTYPE;
    return R < 0 || n < 1 || R > INT64_MAX / 16 / n ? MOE_BAD_SHAPE : MOE_OK;
}

size_t moe_rms_norm_workspace(int64_t n) { return (size_t)(8 * n); }

int moe_rms_norm(int dtype, int wdtype, int64_t R, int64_t n, double eps, const void *x_Rn, const void *w_n,
                 void *workspace, void *y_Rn, void *r_R) {
    const int status = check_norm(dtype, wdtype, R, n);
    if (status != MOE_OK) return status;
    moe_k->load(wdtype, n, w_n, workspace);
    norm_job job = {.dtype = dtype, .R = R, .n = n, .eps = eps, .x_Rn = x_Rn, .w_n = workspace, .y_Rn = y_Rn,
                    .r_R = r_R};
    moe_parallel(R, moe_row_grain(n), norm_rows, &job);
    return MOE_OK;
}

size_t moe_rms_norm_backward_workspace(int64_t R, int64_t n) { return (size_t)(8 * n * (1 + blocks_of(R))); }

int moe_rms_norm_backward(int dtype, int wdtype, int64_t R, int64_t n, const void *x_Rn, const void *w_n,
                          const void *r_R, const void *dy_Rn, void *workspace, void *dx_Rn, void *dw_n) {
    const int status = check_norm(dtype, wdtype, R, n);
    if (status != MOE_OK) return status;
    moe_k->load(wdtype, n, w_n, workspace);
    norm_job job = {.dtype = dtype, .R = R, .n = n, .x_Rn = x_Rn, .dy_Rn = dy_Rn, .w_n = workspace, .dx_Rn = dx_Rn,
                    .r_R = (void *)r_R, .dw_Bn = (char *)workspace + 8 * n};
    moe_parallel(blocks_of(R), moe_row_grain(n * BLOCK), dnorm_blocks, &job);
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int64_t b = 0; b < blocks_of(R); b++) sum += real_get(dtype, job.dw_Bn, b * n + i);
        real_tile tile;
        real_set(dtype, &tile, 0, sum);
        moe_k->store(wdtype, 1, &tile, (char *)dw_n + i * moe_size(wdtype));
    }
    return MOE_OK;
}

// ---- addition and norm ----------------------------------------------------------------------------------------------
//   s = x + y    u = (s - mean) r    z = u w + b    with h = dz w:  dx = ds + r (h - mean h - u mean(h u)),  dy = dx
//   dw = sum over rows of dz u    db = sum over rows of dz
// RMSNorm has no mean, of s and of h. In float; sums along a row in 16 lanes, over rows as dw above.
enum { LANES = 16 };

typedef struct {
    int          half;
    bool         centred;
    int64_t      R, n;
    float        eps;
    const float *x_Rn, *w_n, *b_n, *s_Rn, *ds_Rn;
    const char  *y_Rn, *dz_Rn;
    float       *sum_Rn, *stats_R2, *dx_Rn, *sums_B2n;      // of a block: the parts of dw and of db
    char        *z_Rn, *dy_Rn;
} add_norm_job;

static float fold(const float *lane) {
    float half[LANES / 2];
    for (int l = 0; l < LANES / 2; l++) half[l] = lane[l] + lane[l + LANES / 2];
    for (int step = LANES / 4; step; step /= 2)
        for (int l = 0; l < step; l++) half[l] += half[l + step];
    return half[0];
}
static float sum_of(int64_t n, const float *x) {
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n - n % LANES; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += x[i + l];
    for (int64_t i = n - n % LANES; i < n; i++) lane[i % LANES] += x[i];
    return fold(lane);
}
static float squares_of(int64_t n, const float *x, float mean) {
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n - n % LANES; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += (x[i + l] - mean) * (x[i + l] - mean);
    for (int64_t i = n - n % LANES; i < n; i++) lane[i % LANES] += (x[i] - mean) * (x[i] - mean);
    return fold(lane);
}

static void add_norm_rows(int64_t begin, int64_t end, void *arg) {
    const add_norm_job *job = arg;
    const int64_t n = job->n, size = moe_size(job->half);
    real_tile tile;
    for (int64_t m = begin; m < end; m++) {
        const float *s = job->x_Rn + m * n;
        if (job->y_Rn) {
            float *sum = job->sum_Rn + m * n;
            for (int64_t i = 0; i < n; i += TILE) {
                const int64_t k = n - i < TILE ? n - i : TILE;
                moe_k->load(job->half, k, job->y_Rn + (m * n + i) * size, &tile);
                for (int64_t j = 0; j < k; j++) sum[i + j] = s[i + j] + tile.f32[j];
            }
            s = sum;
        }
        const float mean = job->centred ? sum_of(n, s) / (float)n : 0;
        const float r = 1 / sqrtf(squares_of(n, s, mean) / (float)n + job->eps);
        job->stats_R2[2 * m] = mean;
        job->stats_R2[2 * m + 1] = r;
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            for (int64_t j = 0; j < k; j++) tile.f32[j] = (s[i + j] - mean) * r * job->w_n[i + j];
            if (job->b_n)
                for (int64_t j = 0; j < k; j++) tile.f32[j] += job->b_n[i + j];
            moe_k->store(job->half, k, &tile, job->z_Rn + (m * n + i) * size);
        }
    }
}

static void dadd_norm_blocks(int64_t begin, int64_t end, void *arg) {
    const add_norm_job *job = arg;
    const int64_t n = job->n, size = moe_size(job->half), last = end * BLOCK < job->R ? end * BLOCK : job->R;
    const float *restrict w = job->w_n;
    float h[TILE], u[TILE];
    real_tile tile;
    memset(job->sums_B2n + begin * 2 * n, 0, (size_t)((end - begin) * 2 * n) * sizeof(float));
    for (int64_t m = begin * BLOCK; m < last; m++) {
        const float *restrict s = job->s_Rn + m * n, mean = job->stats_R2[2 * m], r = job->stats_R2[2 * m + 1];
        const char *dz = job->dz_Rn + m * n * size;
        float *restrict dx = job->dx_Rn + m * n;
        float *restrict dw = job->sums_B2n + m / BLOCK * 2 * n, *restrict db = dw + n;
        float sum = 0, dot = 0;
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            moe_k->load(job->half, k, dz + i * size, &tile);
            for (int64_t j = 0; j < k; j++) {
                h[j] = tile.f32[j] * w[i + j];
                u[j] = h[j] * ((s[i + j] - mean) * r);
            }
            sum += sum_of(k, h);
            dot += sum_of(k, u);
        }
        const float mean_h = job->centred ? sum / (float)n : 0, mean_hu = dot / (float)n;
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t k = n - i < TILE ? n - i : TILE;
            moe_k->load(job->half, k, dz + i * size, &tile);
            for (int64_t j = 0; j < k; j++) {       // one at a time: so they are vectorised
                u[j] = (s[i + j] - mean) * r;
                h[j] = tile.f32[j] * w[i + j];
            }
            for (int64_t j = 0; j < k; j++) dx[i + j] = r * (h[j] - mean_h - u[j] * mean_hu);
            for (int64_t j = 0; j < k; j++) dw[i + j] += tile.f32[j] * u[j];
            for (int64_t j = 0; j < k; j++) db[i + j] += tile.f32[j];
        }
        if (job->ds_Rn)
            for (int64_t i = 0; i < n; i++) dx[i] += job->ds_Rn[m * n + i];
        if (job->dy_Rn) moe_k->store(job->half, n, dx, job->dy_Rn + m * n * size);
    }
}

static int check_add_norm(int half, int64_t R, int64_t n) {
    if (half != MOE_BF16 && half != MOE_F16) return MOE_BAD_DTYPE;
    return check_norm(MOE_F32, MOE_F32, R, n);
}

int moe_add_norm(int half, int centred, int64_t R, int64_t n, double eps, const float *x_Rn, const void *y_Rn,
                 const float *w_n, const float *b_n, float *s_Rn, void *z_Rn, float *stats_R2) {
    const int status = check_add_norm(half, R, n);
    if (status != MOE_OK) return status;
    add_norm_job job = {.half = half, .centred = centred, .R = R, .n = n, .eps = (float)eps, .x_Rn = x_Rn, .y_Rn = y_Rn,
                        .w_n = w_n, .b_n = b_n, .sum_Rn = s_Rn, .z_Rn = z_Rn, .stats_R2 = stats_R2};
    moe_parallel(R, moe_row_grain(n), add_norm_rows, &job);
    return MOE_OK;
}

size_t moe_add_norm_backward_workspace(int64_t R, int64_t n) { return (size_t)(8 * n * blocks_of(R)); }

int moe_add_norm_backward(int half, int centred, int64_t R, int64_t n, const float *ds_Rn, const void *dz_Rn,
                          const float *s_Rn, const float *w_n, const float *stats_R2, void *workspace, float *dx_Rn,
                          void *dy_Rn, float *dw_n, float *db_n) {
    const int status = check_add_norm(half, R, n);
    if (status != MOE_OK) return status;
    add_norm_job job = {.half = half, .centred = centred, .R = R, .n = n, .ds_Rn = ds_Rn, .dz_Rn = dz_Rn,
                        .s_Rn = s_Rn, .w_n = w_n, .stats_R2 = (float *)stats_R2, .sums_B2n = workspace,
                        .dx_Rn = dx_Rn, .dy_Rn = dy_Rn};
    moe_parallel(blocks_of(R), moe_row_grain(n * BLOCK), dadd_norm_blocks, &job);
    for (int64_t i = 0; i < n; i++) {
        double dw = 0, db = 0;
        for (int64_t b = 0; b < blocks_of(R); b++) {
            dw += (double)job.sums_B2n[b * 2 * n + i];
            db += (double)job.sums_B2n[(b * 2 + 1) * n + i];
        }
        dw_n[i] = (float)dw;
        if (db_n) db_n[i] = (float)db;
    }
    return MOE_OK;
}

// ---- the sum of squares ---------------------------------------------------------------------------------------------
typedef struct { int dtype; int64_t n; const char *x_n; double *sums; } square_job;

static void square_pieces(int64_t begin, int64_t end, void *arg) {
    const square_job *job = arg;
    const int64_t size = moe_size(job->dtype);
    real_tile tile;
    for (int64_t p = begin; p < end; p++) {
        const int64_t last = (p + 1) * PIECE < job->n ? (p + 1) * PIECE : job->n;
        double sum = 0;
        for (int64_t i = p * PIECE; i < last; i += TILE) {
            const int64_t k = last - i < TILE ? last - i : TILE;
            sum += moe_k->square_sum(job->dtype == MOE_F64, k, real_load(job->dtype, k, job->x_n + i * size, &tile));
        }
        job->sums[p] = sum;
    }
}

size_t moe_square_sum_workspace(int64_t n) { return (size_t)(8 * (n / PIECE + 1)); }

int moe_square_sum(int dtype, int64_t n, const void *x_n, void *workspace, double *sum) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    if (n < 0) return MOE_BAD_SHAPE;
    square_job job = {dtype, n, x_n, workspace};
    const int64_t pieces = (n + PIECE - 1) / PIECE;
    moe_parallel(pieces, 1, square_pieces, &job);
    *sum = 0;
    for (int64_t p = 0; p < pieces; p++) *sum += job.sums[p];
    return MOE_OK;
}
