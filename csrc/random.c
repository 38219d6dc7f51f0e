// random.c: numbers that do not know the mesh. Element (row, col) is a pure function of seed, step, site, the row's
// global number and col, whatever part of the matrix a rank holds and however many threads fill it; philox.h has the
// generator.
//
//   uniform  low + (high-low) * u       normal  mean + std * z       dropout  x / (1-p) where u >= p, else 0
//
// Matrices [rows, cols], row-major. Numbers are computed in float whatever the dtype (MOE_F64 holds those of MOE_F32)
// and rounded once, which in 16 bits may turn a value just below `high` into high; dropout scales in real.
// cols <= 2^34; moe.h says what a key may be.
#include "philox.h"
#include "real.h"
#include <math.h>

enum { TILE = 256 };        // columns at a time; a multiple of the 64 that moe_k->random draws at once

typedef enum { UNIFORM, NORMAL, DROPOUT } draw;
typedef struct {
    draw           what;
    int            dtype;
    moe_random_key key;
    int64_t        cols;
    float          shift, scale, limit;         // UNIFORM, NORMAL: min(scale * u + shift, limit)
    float          p;                           // DROPOUT: dropped below p
    double         keep_scale;
    const char    *x;
    char          *y;
} random_job;

static void random_rows(int64_t begin, int64_t end, void *arg) {
    const random_job *job = arg;
    const int dtype = job->dtype;
    const int64_t size = moe_size(dtype);
    float u[TILE];
    union { float f32[TILE]; double f64[TILE]; } y;
    for (int64_t row = begin; row < end; row++)
        for (int64_t col = 0; col < job->cols; col += TILE) {
            const int64_t n = job->cols - col < TILE ? job->cols - col : TILE, at = (row * job->cols + col) * size;
            moe_k->random(job->what == NORMAL, &job->key, row, col, n, u);
            if (job->what == DROPOUT) {
                moe_k->load(dtype, n, job->x + at, &y);
                for (int64_t i = 0; i < n; i++)
                    if (dtype == MOE_F64) y.f64[i] = u[i] < job->p ? 0 : job->keep_scale * y.f64[i];
                    else y.f32[i] = u[i] < job->p ? 0 : (float)job->keep_scale * y.f32[i];
            } else {
                for (int64_t i = 0; i < n; i++) {
                    const float value = job->scale * u[i] + job->shift;
                    u[i] = value < job->limit ? value : job->limit;
                }
                for (int64_t i = 0; i < n; i++) real_set(dtype, &y, i, u[i]);
            }
            moe_k->store(dtype, n, &y, job->y + at);
        }
}

static int fill(random_job *job, int64_t rows) {
    if (!moe_is_float(job->dtype)) return MOE_BAD_DTYPE;
    if (rows < 0 || job->cols < 0 || job->cols > INT64_C(1) << 34) return MOE_BAD_SHAPE;
    if (job->cols > 0 && rows > INT64_MAX / 8 / job->cols) return MOE_BAD_SHAPE;
    if (!philox_key_ok(&job->key, rows)) return MOE_BAD_VALUE;
    moe_parallel(rows, 4096 / (job->cols + 1) + 1, random_rows, job);
    return MOE_OK;
}

int moe_uniform(int dtype, moe_random_key key, int64_t rows, int64_t cols, double low, double high, void *y) {
    random_job job = {.what = UNIFORM, .dtype = dtype, .key = key, .cols = cols, .shift = (float)low,
                      .scale = (float)(high - low), .limit = nextafterf((float)high, -INFINITY), .y = y};
    if (!(job.shift < (float)high) || !isfinite(job.shift) || !isfinite(job.scale)) return MOE_BAD_VALUE;
    return fill(&job, rows);
}

int moe_normal(int dtype, moe_random_key key, int64_t rows, int64_t cols, double mean, double std, void *y) {
    random_job job = {.what = NORMAL, .dtype = dtype, .key = key, .cols = cols,
                      .shift = (float)mean, .scale = (float)std, .limit = INFINITY, .y = y};
    if (!isfinite(job.shift) || !isfinite(job.scale) || std < 0) return MOE_BAD_VALUE;
    return fill(&job, rows);
}

int moe_dropout(int dtype, moe_random_key key, int64_t rows, int64_t cols, double p, const void *x, void *y) {
    if (!(p >= 0 && p <= 1)) return MOE_BAD_VALUE;
    float threshold = (float)p;
    if (threshold < p) threshold = nextafterf(threshold, 1);        // u < threshold is then u < p, for every float u
    random_job job = {.what = DROPOUT, .dtype = dtype, .key = key, .cols = cols, .p = threshold,
                      .keep_scale = 1 / (1 - p), .x = x, .y = y};
    return fill(&job, rows);
}
