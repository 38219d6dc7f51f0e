// rope.cu: the twin of csrc/rope.c: RoPE's rotation of the pairs (x[i], x[i + n]) of the first 2n columns of each head.
//
//   y[i] = x[i] cos[i] - x[i+n] sin[i]      y[i+n] = x[i+n] cos[i] + x[i] sin[i]      for i < n;  the rest is copied
//
// One pass: a thread turns eight neighbouring pairs at a time, or copies eight columns of the rest, in float, rounded
// once. inverse: with the other sign of sin, which is the backward.
#include "common.cuh"

enum { THREADS = 256 };

struct rotate_job {
    int64_t P, H, d, n;
    int64_t turned, pieces;     // of a head: pieces of pairs, and with those of the rest
    float   sign;
};

template <class T>
__global__ void __launch_bounds__(THREADS)
rotate_kernel(rotate_job job, int64_t all, const T *x_RHd, const float *cos_Pn, const float *sin_Pn, T *y_RHd) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t p = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; p < all; p += stride) {
        const int64_t head = p / job.pieces, piece = p - head * job.pieces;
        const T *x = x_RHd + head * job.d;
        T *y = y_RHd + head * job.d;
        float a[8];
        if (piece >= job.turned) {
            const int64_t i = 2 * job.n + (piece - job.turned) * 8;
            const int k = static_cast<int>(min64(8, job.d - i));
            load8(x + i, k, a);
            store8(y + i, k, a);
            continue;
        }
        const int64_t i = piece * 8, at = head / job.H % job.P * job.n + i;
        const int k = static_cast<int>(min64(8, job.n - i));
        float b[8], cos[8], sin[8], ya[8], yb[8];
        load8(x + i, k, a);
        load8(x + job.n + i, k, b);
        load8(cos_Pn + at, k, cos);
        load8(sin_Pn + at, k, sin);
        for (int v = 0; v < 8; v++) {
            const float s = job.sign * sin[v];
            ya[v] = a[v] * cos[v] - b[v] * s;
            yb[v] = b[v] * cos[v] + a[v] * s;
        }
        store8(y + i, k, ya);
        store8(y + job.n + i, k, yb);
    }
}

int moe_rotate(int dtype, int64_t R, int64_t P, int64_t H, int64_t d, int64_t n, int inverse, const void *x_RHd,
               const void *cos_Pn, const void *sin_Pn, void *y_RHd, cudaStream_t stream) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    if (R < 0 || H < 0 || d < 0 || n < 0 || n > d / 2 || (H && d > INT64_MAX / 8 / H)) return MOE_BAD_SHAPE;
    if (H * d > 0 && R > INT64_MAX / 8 / (H * d)) return MOE_BAD_SHAPE;
    if (R && (P < 1 || R % P)) return MOE_BAD_SHAPE;
    const int64_t turned = ceil_div(n, 8), pieces = turned + ceil_div(d - 2 * n, 8), all = R * H * pieces;
    const rotate_job job = {P, H, d, n, turned, pieces, inverse ? -1.0f : 1.0f};
    return by_float(dtype, [&]<class T>(T) {
        return launch(rotate_kernel<T>, strided_grid(all, THREADS), THREADS, 0, stream, job, all,
                      static_cast<const T *>(x_RHd), static_cast<const float *>(cos_Pn),
                      static_cast<const float *>(sin_Pn), static_cast<T *>(y_RHd));
    });
}
