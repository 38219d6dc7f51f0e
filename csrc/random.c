// random.c: numbers that do not know the mesh. Element (row, col) is a pure function of seed, step, site, row0 + row
// and col, whatever part of the matrix a rank holds and however many threads fill it; philox.h has the generator.
//
//   uniform  low + (high-low) * u       normal  mean + std * z       dropout  x / (1-p) where u >= p, else 0
//
// Matrices [rows, cols], row-major. Numbers are computed in float whatever the dtype (MOE_F64 holds those of MOE_F32)
// and rounded once, which in 16 bits may turn a value just below `high` into high; dropout scales in real.
// cols <= 2^34; step and site in [0, 2^32); row0 >= 0.
#include "philox.h"
#include "real.h"

enum { TILE = 256 };        // columns at a time; a multiple of 4

typedef enum { UNIFORM, NORMAL, DROPOUT } draw;
typedef struct {
    draw           what;
    int            dtype;
    moe_random_key key;
    int64_t        cols;
    float          low, width, below_high;      // UNIFORM
    float          mean, std;                   // NORMAL
    double         p, keep_scale;               // DROPOUT
    const char    *x;
    char          *y;
} random_job;

// u[0..n) are the uniform or normal numbers of columns col..col+n of a row, col a multiple of 4.
static void draw_row(const random_job *job, int64_t row, int64_t col, int64_t n, float u[TILE]) {
    const moe_random_key *key = &job->key;
    for (int64_t i = 0; i < n; i += 4) {        // may fill up to 3 past n: TILE is a multiple of 4
        const philox_block block = philox_at(key->seed, key->step, key->site, key->row0 + row, (col + i) / 4);
        if (job->what == NORMAL) {
            philox_normal(block.word[0], block.word[1], &u[i], &u[i + 1]);
            philox_normal(block.word[2], block.word[3], &u[i + 2], &u[i + 3]);
        } else {
            for (int l = 0; l < 4; l++) u[i + l] = philox_uniform(block.word[l]);
        }
    }
}

static void random_rows(int64_t begin, int64_t end, void *arg) {
    const random_job *job = arg;
    const int dtype = job->dtype;
    const int64_t size = moe_size(dtype);
    float u[TILE];
    union { float f32[TILE]; double f64[TILE]; } tile;
    for (int64_t row = begin; row < end; row++)
        for (int64_t col = 0; col < job->cols; col += TILE) {
            const int64_t n = job->cols - col < TILE ? job->cols - col : TILE, at = (row * job->cols + col) * size;
            draw_row(job, row, col, n, u);
            if (job->what == DROPOUT) moe_k->load(dtype, n, job->x + at, &tile);
            for (int64_t i = 0; i < n; i++) {
                double value;
                if (job->what == DROPOUT) value = u[i] >= job->p ? job->keep_scale * real_get(dtype, &tile, i) : 0;
                else if (job->what == NORMAL) value = fmaf(job->std, u[i], job->mean);
                else value = fminf(fmaf(job->width, u[i], job->low), job->below_high);
                real_set(dtype, &tile, i, value);
            }
            moe_k->store(dtype, n, &tile, job->y + at);
        }
}

static int fill(random_job *job, int64_t rows) {
    if (!moe_is_float(job->dtype)) return MOE_BAD_DTYPE;
    const moe_random_key *key = &job->key;
    if (rows < 0 || job->cols < 0 || job->cols > INT64_C(1) << 34) return MOE_BAD_SHAPE;
    if (job->cols > 0 && rows > INT64_MAX / 8 / job->cols) return MOE_BAD_SHAPE;
    if (key->step < 0 || key->step > UINT32_MAX || key->site < 0 || key->site > UINT32_MAX) return MOE_BAD_VALUE;
    if (key->row0 < 0 || key->row0 > INT64_MAX - rows) return MOE_BAD_VALUE;
    moe_parallel(rows, 4096 / (job->cols + 1) + 1, random_rows, job);
    return MOE_OK;
}

int moe_uniform(int dtype, moe_random_key key, int64_t rows, int64_t cols, double low, double high, void *y) {
    random_job job = {.what = UNIFORM, .dtype = dtype, .key = key, .cols = cols, .low = (float)low,
                      .width = (float)(high - low), .below_high = nextafterf((float)high, -INFINITY), .y = y};
    if (!(job.low < (float)high) || !isfinite(job.low) || !isfinite(job.width)) return MOE_BAD_VALUE;
    return fill(&job, rows);
}

int moe_normal(int dtype, moe_random_key key, int64_t rows, int64_t cols, double mean, double std, void *y) {
    random_job job = {.what = NORMAL, .dtype = dtype, .key = key, .cols = cols,
                      .mean = (float)mean, .std = (float)std, .y = y};
    if (!isfinite(job.mean) || !isfinite(job.std) || std < 0) return MOE_BAD_VALUE;
    return fill(&job, rows);
}

int moe_dropout(int dtype, moe_random_key key, int64_t rows, int64_t cols, double p, const void *x, void *y) {
    if (!(p >= 0 && p <= 1)) return MOE_BAD_VALUE;
    const double scale = 1 / (1 - p);
    random_job job = {.what = DROPOUT, .dtype = dtype, .key = key, .cols = cols, .p = p,
                      .keep_scale = dtype == MOE_F64 ? scale : (float)scale, .x = x, .y = y};
    return fill(&job, rows);
}
