// random.cu: the twins of csrc/random.c, bit for bit: the numbers come from csrc/philox.h on both sides.
//
//   uniform  min(low + (high-low) u, below high)     normal  mean + std z     dropout  x / (1-p) where u >= p, else 0
//
// A thread owns four neighbouring columns of a row: one Philox block.
#include <cmath>

#include "../csrc/philox.h"
#include "common.cuh"

enum draw { UNIFORM, NORMAL, DROPOUT };
struct random_job {
    moe_random_key key;
    int64_t        rows, cols;
    float          shift, scale, limit;         // UNIFORM, NORMAL: min(scale * u + shift, limit)
    float          p, keep_scale;               // DROPOUT: dropped below p
};

template <draw what, class T>
__global__ void random_kernel(random_job job, const T *x, T *y) {
    const int64_t blocks = ceil_div(job.cols, 4), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < job.rows * blocks; i += stride) {
        const int64_t row = i / blocks, col = i % blocks * 4;
        const philox_block b = philox_at(job.key.seed, job.key.step, job.key.site, philox_row(&job.key, row), col / 4);
        float u[4];
        for (int w = 0; w < 4; w++) u[w] = philox_uniform(b.word[w]);
        if (what == NORMAL)
            for (int w = 0; w < 4; w += 2) philox_normal(b.word[w], b.word[w + 1], &u[w], &u[w + 1]);
        for (int w = 0; w < 4 && col + w < job.cols; w++) {
            const int64_t at = row * job.cols + col + w;
            float value = job.scale * u[w] + job.shift;
            value = value < job.limit ? value : job.limit;
            if (what == DROPOUT) value = u[w] < job.p ? 0 : job.keep_scale * to_float(x[at]);
            y[at] = from_float<T>(value);
        }
    }
}

template <draw what>
static int fill(int dtype, random_job job, const void *x, void *y, cudaStream_t stream) {
    if (job.rows < 0 || job.cols < 0 || job.cols > INT64_C(1) << 34) return MOE_BAD_SHAPE;
    if (job.cols > 0 && job.rows > INT64_MAX / 8 / job.cols) return MOE_BAD_SHAPE;
    if (!philox_key_ok(&job.key, job.rows)) return MOE_BAD_VALUE;
    const int64_t grid = strided_grid(job.rows * ceil_div(job.cols, 4), 256);
    return by_float(dtype, [&]<class T>(T) {
        return launch(random_kernel<what, T>, grid, 256, 0, stream, job, static_cast<const T *>(x),
                      static_cast<T *>(y));
    });
}

int moe_uniform(int dtype, moe_random_key key, int64_t rows, int64_t cols, double low, double high, void *y,
                cudaStream_t stream) {
    const random_job job = {key, rows, cols, static_cast<float>(low), static_cast<float>(high - low),
                            std::nextafterf(static_cast<float>(high), -INFINITY), 0, 0};
    if (!(job.shift < static_cast<float>(high)) || !std::isfinite(job.shift) || !std::isfinite(job.scale))
        return MOE_BAD_VALUE;
    return fill<UNIFORM>(dtype, job, nullptr, y, stream);
}

int moe_normal(int dtype, moe_random_key key, int64_t rows, int64_t cols, double mean, double std, void *y,
               cudaStream_t stream) {
    const random_job job = {key, rows, cols, static_cast<float>(mean), static_cast<float>(std), INFINITY, 0, 0};
    if (!std::isfinite(job.shift) || !std::isfinite(job.scale) || std < 0) return MOE_BAD_VALUE;
    return fill<NORMAL>(dtype, job, nullptr, y, stream);
}

int moe_dropout(int dtype, moe_random_key key, int64_t rows, int64_t cols, double p, const void *x, void *y,
                cudaStream_t stream) {
    if (!(p >= 0 && p <= 1)) return MOE_BAD_VALUE;
    float threshold = static_cast<float>(p);
    if (threshold < p) threshold = std::nextafterf(threshold, 1);       // u < threshold is then u < p, for all floats u
    const random_job job = {key, rows, cols, 0, 0, 0, threshold, static_cast<float>(1 / (1 - p))};
    return fill<DROPOUT>(dtype, job, x, y, stream);
}
