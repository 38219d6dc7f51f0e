// norm.cu: the twins of csrc/norm.c: RMSNorm and its backward; a residual addition with the norm behind it; the sum of
// squares of a tensor.
//
//   r_m = 1 / sqrt(mean_i x[m,i]^2 + eps)        y[m,i] = r_m x[m,i] w[i]
//   dx[m,i] = r_m w[i] dy[m,i] - c_m x[m,i],     c_m = r_m^3 mean_i(dy[m,i] w[i] x[m,i])
//   dw[i] = sum_m r_m x[m,i] dy[m,i]
//
// A row belongs to one group of `width` threads, each of which owns the pieces of eight columns at its place and every
// `width` further on. A row is read from memory once: for the second pass over it the first has left it in the caches.
// Sums are float; their order is set by R and n: a thread's columns in turn, a fixed tree over the group, and of dw the
// rows of a group in turn, the groups of a block in turn, and then the blocks, whose number R and n decide, in double.
#include "common.cuh"

// ---- a row and its group ------------------------------------------------------------------------------------------
enum { BLOCK = 256, WIDEST = 512, MOST_BLOCKS = 1024 };

struct norm_job {
    int64_t R, n;
    int     width, groups;      // threads of a row, a multiple of 32; rows that a block has at once
};
static norm_job job_of(int64_t R, int64_t n) {
    const int width = static_cast<int>(min64(WIDEST, round_up(ceil_div(n, 8), 32)));
    return {R, n, width, static_cast<int>(max64(1, BLOCK / width))};
}
static int check_norm(int dtype, int wdtype, int64_t R, int64_t n) {
    if (!is_float(dtype) || (wdtype != dtype && wdtype != MOE_F32)) return MOE_BAD_DTYPE;
    return R < 0 || n < 1 || R > INT64_MAX / 16 / n ? MOE_BAD_SHAPE : MOE_OK;
}

// body(first column, number of columns) for each piece of this thread.
template <class Body>
static __device__ inline void for_pieces(const norm_job &job, Body body) {
    const int64_t stride = static_cast<int64_t>(job.width) * 8;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) % job.width * 8; i < job.n; i += stride)
        body(i, static_cast<int>(min64(8, job.n - i)));
}
// The sum over the threads of the group, in each of them; all threads of the block call. shared: a float for each
// warp, which a barrier protects from the call before.
static __device__ inline float group_sum(const norm_job &job, float x, float *shared) {
    x = warp_sum(x);
    if (job.width == 32) return x;
    __syncthreads();
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    const int warps = job.width / 32, first = warp_id() / warps * warps;
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += shared[first + w];
    return sum;
}

// f(T{}, W{}) for the types of x and w; MOE_BAD_DTYPE for others.
template <class F>
static int by_floats(int dtype, int wdtype, F f) {
    return by_float(dtype, [&]<class T>(T x) { return wdtype == dtype ? f(x, x) : f(x, float{}); });
}

// ---- y = x r w ------------------------------------------------------------------------------------------------------
template <class T, class W>
__global__ void __launch_bounds__(WIDEST)
norm_kernel(norm_job job, float eps, const T *x_Rn, const W *w_n, T *y_Rn, float *r_R) {
    float *shared = reinterpret_cast<float *>(shared_memory());
    const int64_t m = static_cast<int64_t>(blockIdx.x) * job.groups + threadIdx.x / job.width;
    const bool real = m < job.R;                // the others come to the barriers
    float sum = 0;
    if (real)
        for_pieces(job, [&](int64_t i, int k) {
            float x[8];
            load8(x_Rn + m * job.n + i, k, x);
            for (int v = 0; v < 8; v++) sum += x[v] * x[v];
        });
    const float r = 1 / sqrtf(group_sum(job, sum, shared) / static_cast<float>(job.n) + eps);
    if (!real) return;
    if (threadIdx.x % job.width == 0) r_R[m] = r;
    for_pieces(job, [&](int64_t i, int k) {
        float x[8], w[8];
        load8(x_Rn + m * job.n + i, k, x);
        load8(w_n + i, k, w);
        for (int v = 0; v < 8; v++) x[v] = x[v] * r * w[v];
        store8(y_Rn + m * job.n + i, k, x);
    });
}

size_t moe_rms_norm_workspace(int64_t, cudaStream_t) { return 0; }

int moe_rms_norm(int dtype, int wdtype, int64_t R, int64_t n, double eps, const void *x_Rn, const void *w_n, void *,
                 void *y_Rn, void *r_R, cudaStream_t stream) {
    TRY(check_norm(dtype, wdtype, R, n));
    const norm_job job = job_of(R, n);
    return by_floats(dtype, wdtype, [&]<class T, class W>(T, W) {
        return launch(norm_kernel<T, W>, ceil_div(R, job.groups), job.width * job.groups, 32 * sizeof(float), stream,
                      job, static_cast<float>(eps), static_cast<const T *>(x_Rn), static_cast<const W *>(w_n),
                      static_cast<T *>(y_Rn), static_cast<float *>(r_R));
    });
}

// ---- dx, and of dw the part of each block ---------------------------------------------------------------------------
// Block b has the `rows` rows from b * rows on. A group adds its part of dw (and db) in shared memory or, of rows too
// wide for that, where it would go: a column of a group is one thread's.
struct dnorm_job : norm_job {
    int64_t rows, blocks;
    int64_t row, sums;          // floats of dw, filled up to whole pieces; of a group with db
    bool    in_shared;

    size_t shared() const { return sizeof(float) * static_cast<size_t>(32 + in_shared * groups * sums); }
    size_t workspace() const { return sizeof(float) * static_cast<size_t>(blocks * groups * sums); }
    // Where this thread's group adds, and where its sums go.
    __device__ float *place(float *sums_G) const {
        return sums_G + (static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / width) * sums;
    }
    __device__ float *adding(float *shared, float *sums_G) const {
        return in_shared ? shared + 32 + threadIdx.x / width * sums : place(sums_G);
    }
};
static dnorm_job backward_job_of(int64_t R, int64_t n, int rows_of_sums) {
    const norm_job job = job_of(R, n);
    const int64_t rows = round_up(max64(1, ceil_div(R, MOST_BLOCKS)), job.groups), row = round_up(n, 8);
    const int64_t sums = rows_of_sums * row;
    return {job, rows, ceil_div(R, rows), row, sums, job.groups * sums <= 16 * 1024};
}
// from NULL: zeros.
static __device__ inline void copy_sums(const dnorm_job &job, const float *from, float *to) {
    for (int64_t at = 0; at < job.sums; at += job.row)
        for_pieces(job, [&](int64_t i, int) {
            float x[8] = {};
            if (from) load8(from + at + i, 8, x);
            store8(to + at + i, 8, x);
        });
}
static __device__ inline void add8(float *sums, const float (&x)[8]) {
    float total[8];
    load8(sums, 8, total);
    for (int v = 0; v < 8; v++) total[v] += x[v];
    store8(sums, 8, total);
}

template <class T, class W>
__global__ void __launch_bounds__(WIDEST)
dnorm_kernel(dnorm_job job, const T *x_Rn, const W *w_n, const float *r_R, const T *dy_Rn, T *dx_Rn, float *sums_Gn) {
    float *shared = reinterpret_cast<float *>(shared_memory()), *dw = job.adding(shared, sums_Gn);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * job.rows, last = min64(first + job.rows, job.R);
    copy_sums(job, nullptr, dw);
    for (int64_t begin = first; begin < last; begin += job.groups) {
        const int64_t m = begin + threadIdx.x / job.width, at = m * job.n;
        const bool real = m < last;
        float sum = 0;
        if (real)
            for_pieces(job, [&](int64_t i, int k) {
                float x[8], dy[8], w[8];
                load8(x_Rn + at + i, k, x);
                load8(dy_Rn + at + i, k, dy);
                load8(w_n + i, k, w);
                for (int v = 0; v < 8; v++) sum += dy[v] * w[v] * x[v];
            });
        const float mean = group_sum(job, sum, shared) / static_cast<float>(job.n);
        if (!real) continue;
        const float r = r_R[m], c = r * r * r * mean;
        for_pieces(job, [&](int64_t i, int k) {
            float x[8], dy[8], w[8], dx[8];
            load8(x_Rn + at + i, k, x);
            load8(dy_Rn + at + i, k, dy);
            load8(w_n + i, k, w);
            for (int v = 0; v < 8; v++) {
                dx[v] = r * w[v] * dy[v] - c * x[v];
                x[v] = r * x[v] * dy[v];
            }
            store8(dx_Rn + at + i, k, dx);
            add8(dw + i, x);
        });
    }
    if (job.in_shared) copy_sums(job, dw, job.place(sums_Gn));
}

// dw_n = the sum of G rows, `stride` apart: of STRIPS threads each adds every STRIPS-th row of a column.
enum { COLUMNS = 32, STRIPS = 16 };
template <class W>
__global__ void __launch_bounds__(COLUMNS * STRIPS)
dw_kernel(int64_t G, int64_t stride, int64_t n, const float *sums_Gn, W *dw_n) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    const int64_t i = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x % COLUMNS;
    double sum = 0;
    if (i < n) {
#pragma unroll 8
        for (int64_t g = threadIdx.x / COLUMNS; g < G; g += STRIPS) sum += static_cast<double>(sums_Gn[g * stride + i]);
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= COLUMNS || i >= n) return;
    for (int s = 1; s < STRIPS; s++) sum += shared[s * COLUMNS + threadIdx.x];
    dw_n[i] = from_float<W>(static_cast<float>(sum));
}
template <class W>
static int sum_blocks(const dnorm_job &job, const float *sums_Gn, W *dw_n, cudaStream_t stream) {
    return launch(dw_kernel<W>, ceil_div(job.n, COLUMNS), COLUMNS * STRIPS, COLUMNS * STRIPS * sizeof(double), stream,
                  job.blocks * job.groups, job.sums, job.n, sums_Gn, dw_n);
}

size_t moe_rms_norm_backward_workspace(int64_t R, int64_t n, cudaStream_t) {
    return check_norm(MOE_F32, MOE_F32, R, n) == MOE_OK ? backward_job_of(R, n, 1).workspace() : 0;
}

int moe_rms_norm_backward(int dtype, int wdtype, int64_t R, int64_t n, const void *x_Rn, const void *w_n,
                          const void *r_R, const void *dy_Rn, void *workspace, void *dx_Rn, void *dw_n,
                          cudaStream_t stream) {
    TRY(check_norm(dtype, wdtype, R, n));
    const dnorm_job job = backward_job_of(R, n, 1);
    float *sums_Gn = static_cast<float *>(workspace);
    return by_floats(dtype, wdtype, [&]<class T, class W>(T, W) {
        TRY(launch(dnorm_kernel<T, W>, job.blocks, job.width * job.groups, job.shared(), stream, job,
                   static_cast<const T *>(x_Rn), static_cast<const W *>(w_n), static_cast<const float *>(r_R),
                   static_cast<const T *>(dy_Rn), static_cast<T *>(dx_Rn), sums_Gn));
        return sum_blocks(job, sums_Gn, static_cast<W *>(dw_n), stream);
    });
}

// ---- addition and norm ----------------------------------------------------------------------------------------------
//   s = x + y    u = (s - mean) r    z = u w + b    with h = dz w:  dx = ds + r (h - mean h - u mean(h u)),  dy = dx
//   dw = sum over rows of dz u    db = sum over rows of dz
// RMSNorm has no mean, of s and of h.
template <class T>
__global__ void __launch_bounds__(WIDEST)
add_norm_kernel(norm_job job, bool centred, float eps, const float *x_Rn, const T *y_Rn, const float *w_n,
                const float *b_n, float *sum_Rn, T *z_Rn, float *stats_R2) {
    float *shared = reinterpret_cast<float *>(shared_memory());
    const int64_t m = static_cast<int64_t>(blockIdx.x) * job.groups + threadIdx.x / job.width, at = m * job.n;
    const bool real = m < job.R;                // the others come to the barriers
    const float *s_Rn = y_Rn ? sum_Rn : x_Rn;   // a thread reads what it has written itself
    float sum = 0;
    if (real)
        for_pieces(job, [&](int64_t i, int k) {
            float s[8], y[8] = {};
            load8(x_Rn + at + i, k, s);
            if (y_Rn) load8(y_Rn + at + i, k, y);
            for (int v = 0; v < 8; v++) {
                s[v] += y[v];
                sum += s[v];
            }
            if (y_Rn) store8(sum_Rn + at + i, k, s);
        });
    const float n = static_cast<float>(job.n), mean = centred ? group_sum(job, sum, shared) / n : 0;
    sum = 0;
    if (real)
        for_pieces(job, [&](int64_t i, int k) {
            float s[8];
            load8(s_Rn + at + i, k, s);
            for (int v = 0; v < 8; v++) sum += v < k ? (s[v] - mean) * (s[v] - mean) : 0;
        });
    const float r = 1 / sqrtf(group_sum(job, sum, shared) / n + eps);
    if (!real) return;
    if (threadIdx.x % job.width == 0) {
        stats_R2[2 * m] = mean;
        stats_R2[2 * m + 1] = r;
    }
    for_pieces(job, [&](int64_t i, int k) {
        float s[8], w[8], b[8] = {};
        load8(s_Rn + at + i, k, s);
        load8(w_n + i, k, w);
        if (b_n) load8(b_n + i, k, b);
        for (int v = 0; v < 8; v++) s[v] = (s[v] - mean) * r * w[v] + b[v];
        store8(z_Rn + at + i, k, s);
    });
}

static int check_add_norm(int half, int64_t R, int64_t n) {
    return half == MOE_F32 ? MOE_BAD_DTYPE : check_norm(half, half, R, n);
}

int moe_add_norm(int half, int centred, int64_t R, int64_t n, double eps, const float *x_Rn, const void *y_Rn,
                 const float *w_n, const float *b_n, float *s_Rn, void *z_Rn, float *stats_R2, cudaStream_t stream) {
    TRY(check_add_norm(half, R, n));
    const norm_job job = job_of(R, n);
    return by_float(half, [&]<class T>(T) {
        return launch(add_norm_kernel<T>, ceil_div(R, job.groups), job.width * job.groups, 32 * sizeof(float), stream,
                      job, centred, static_cast<float>(eps), x_Rn, static_cast<const T *>(y_Rn), w_n, b_n, s_Rn,
                      static_cast<T *>(z_Rn), stats_R2);
    });
}

template <class T>
__global__ void __launch_bounds__(WIDEST)
dadd_norm_kernel(dnorm_job job, bool centred, const float *ds_Rn, const T *dz_Rn, const float *s_Rn, const float *w_n,
                 const float *stats_R2, float *dx_Rn, T *dy_Rn, float *sums_Gn) {
    float *shared = reinterpret_cast<float *>(shared_memory()), *dw = job.adding(shared, sums_Gn);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * job.rows, last = min64(first + job.rows, job.R);
    const float n = static_cast<float>(job.n);
    copy_sums(job, nullptr, dw);
    for (int64_t begin = first; begin < last; begin += job.groups) {
        const int64_t m = begin + threadIdx.x / job.width, at = m * job.n;
        const bool real = m < last;
        const float mean = real ? stats_R2[2 * m] : 0, r = real ? stats_R2[2 * m + 1] : 0;
        float sum = 0, dot = 0;
        if (real)
            for_pieces(job, [&](int64_t i, int k) {
                float s[8], dz[8], w[8];
                load8(s_Rn + at + i, k, s);
                load8(dz_Rn + at + i, k, dz);
                load8(w_n + i, k, w);
                for (int v = 0; v < 8; v++) {
                    const float h = dz[v] * w[v];
                    sum += h;
                    dot += h * ((s[v] - mean) * r);
                }
            });
        const float mean_h = centred ? group_sum(job, sum, shared) / n : 0, mean_hu = group_sum(job, dot, shared) / n;
        if (!real) continue;
        for_pieces(job, [&](int64_t i, int k) {
            float s[8], dz[8], w[8], ds[8] = {}, dx[8];
            load8(s_Rn + at + i, k, s);
            load8(dz_Rn + at + i, k, dz);
            load8(w_n + i, k, w);
            if (ds_Rn) load8(ds_Rn + at + i, k, ds);
            for (int v = 0; v < 8; v++) {
                const float u = (s[v] - mean) * r;
                dx[v] = r * (dz[v] * w[v] - mean_h - u * mean_hu) + ds[v];
                s[v] = dz[v] * u;
            }
            store8(dx_Rn + at + i, k, dx);
            if (dy_Rn) store8(dy_Rn + at + i, k, dx);
            add8(dw + i, s);
            if (job.sums > job.row) add8(dw + job.row + i, dz);
        });
    }
    if (job.in_shared) copy_sums(job, dw, job.place(sums_Gn));
}

size_t moe_add_norm_backward_workspace(int64_t R, int64_t n, cudaStream_t) {
    return check_norm(MOE_F32, MOE_F32, R, n) == MOE_OK ? backward_job_of(R, n, 2).workspace() : 0;
}

int moe_add_norm_backward(int half, int centred, int64_t R, int64_t n, const float *ds_Rn, const void *dz_Rn,
                          const float *s_Rn, const float *w_n, const float *stats_R2, void *workspace, float *dx_Rn,
                          void *dy_Rn, float *dw_n, float *db_n, cudaStream_t stream) {
    TRY(check_add_norm(half, R, n));
    const dnorm_job job = backward_job_of(R, n, db_n ? 2 : 1);
    float *sums_Gn = static_cast<float *>(workspace);
    TRY(by_float(half, [&]<class T>(T) {
        return launch(dadd_norm_kernel<T>, job.blocks, job.width * job.groups, job.shared(), stream, job, centred,
                      ds_Rn, static_cast<const T *>(dz_Rn), s_Rn, w_n, stats_R2, dx_Rn, static_cast<T *>(dy_Rn),
                      sums_Gn);
    }));
    TRY(sum_blocks(job, sums_Gn, dw_n, stream));
    return db_n ? sum_blocks(job, sums_Gn + job.row, db_n, stream) : MOE_OK;
}

// ---- the sum of squares ---------------------------------------------------------------------------------------------
// Of `blocks` blocks, whose number n decides, each adds in double every piece of eight that is its turn; one more block
// adds these sums.
static int64_t square_blocks(int64_t n) { return min64(MOST_BLOCKS, ceil_div(n, BLOCK * 8)); }

template <class T>
__global__ void __launch_bounds__(BLOCK) square_kernel(int64_t n, const T *x_n, double *sums) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    const int64_t stride = static_cast<int64_t>(gridDim.x) * BLOCK * 8;
    double sum = 0;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x) * 8; i < n; i += stride) {
        float x[8];
        load8(x_n + i, static_cast<int>(min64(8, n - i)), x);
        for (int v = 0; v < 8; v++) sum += static_cast<double>(x[v]) * static_cast<double>(x[v]);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(BLOCK) total_kernel(int64_t blocks, const double *sums, double *total) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    double sum = 0;
    for (int64_t b = threadIdx.x; b < blocks; b += BLOCK) sum += sums[b];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *total = sum;
}

size_t moe_square_sum_workspace(int64_t n, cudaStream_t) {
    return n > 0 ? static_cast<size_t>(square_blocks(n)) * sizeof(double) : 0;
}

int moe_square_sum(int dtype, int64_t n, const void *x_n, void *workspace, double *sum, cudaStream_t stream) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    if (n < 0) return MOE_BAD_SHAPE;
    double *sums = static_cast<double *>(workspace);
    TRY(by_float(dtype, [&]<class T>(T) {
        return launch(square_kernel<T>, square_blocks(n), BLOCK, 32 * sizeof(double), stream, n,
                      static_cast<const T *>(x_n), sums);
    }));
    return launch(total_kernel, 1, BLOCK, 32 * sizeof(double), stream, square_blocks(n), sums, sum);
}
