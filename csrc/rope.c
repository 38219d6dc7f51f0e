// rope.c: RoPE's rotation of the pairs (x[i], x[i + n]) of the first 2n columns of each head.
//
//   y[i] = x[i] cos[i] - x[i+n] sin[i]      y[i+n] = x[i+n] cos[i] + x[i] sin[i]      for i < n;  the rest is copied
//
// The backward is the rotation back: inverse, with the other sign of sin.
#include "real.h"
#include <string.h>

typedef struct {
    int         dtype, sign;
    int64_t     P, H, d, n;
    const char *x_RHd, *cos_Pn, *sin_Pn;
    char       *y_RHd;
} rotate_job;

static void rotate_rows(int64_t begin, int64_t end, void *arg) {
    const rotate_job *job = arg;
    const int dtype = job->dtype;
    const int64_t size = moe_size(dtype), real = moe_real_size(dtype), n = job->n, d = job->d;
    real_tile a_tile, b_tile, ya_tile, yb_tile;
    for (int64_t r = begin; r < end; r++)
        for (int64_t h = 0; h < job->H; h++) {
            const int64_t row = (r * job->H + h) * d * size;
            const char *x = job->x_RHd + row;
            char *y = job->y_RHd + row;
            for (int64_t i = 0; i < n; i += REAL_TILE) {
                const int64_t k = n - i < REAL_TILE ? n - i : REAL_TILE, at = (r % job->P * n + i) * real;
                const char *a = x + i * size, *b = x + (i + n) * size;
                char *ya = y + i * size, *yb = y + (i + n) * size;
                moe_k->rotate(dtype == MOE_F64, k, job->sign, job->cos_Pn + at, job->sin_Pn + at,
                              real_load(dtype, k, a, &a_tile), real_load(dtype, k, b, &b_tile),
                              real_making(dtype, ya, &ya_tile), real_making(dtype, yb, &yb_tile));
                real_made(dtype, k, &ya_tile, ya);
                real_made(dtype, k, &yb_tile, yb);
            }
            if (2 * n < d) memcpy(y + 2 * n * size, x + 2 * n * size, (size_t)((d - 2 * n) * size));
        }
}

int moe_rotate(int dtype, int64_t R, int64_t P, int64_t H, int64_t d, int64_t n, int inverse, const void *x_RHd,
               const void *cos_Pn, const void *sin_Pn, void *y_RHd) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    if (R < 0 || H < 0 || d < 0 || n < 0 || n > d / 2 || (H && d > INT64_MAX / 8 / H)) return MOE_BAD_SHAPE;
    if (H * d > 0 && R > INT64_MAX / 8 / (H * d)) return MOE_BAD_SHAPE;
    if (R && (P < 1 || R % P)) return MOE_BAD_SHAPE;
    rotate_job job = {dtype, inverse ? -1 : 1, P, H, d, n, x_RHd, cos_Pn, sin_Pn, y_RHd};
    moe_parallel(R, moe_row_grain(H * d), rotate_rows, &job);
    return MOE_OK;
}
