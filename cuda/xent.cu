// xent.cu: the twin of csrc/xent.c, the softmax pass of a chunked linear + cross-entropy. One block per row.
//
//   lse_m = logsumexp(logits[m])     loss_m = lse_m - logits[m, target_m]
//   logits[m,v] := dlogits[m,v] = grad_scale * (exp(logits[m,v] - lse_m) - [v == target_m])
//
// logits_MV is read twice, the second time from the L2 cache where it fits, and overwritten. Everything is float: each
// thread keeps the maximum and the sum of what it has read, and the tree that joins them is fixed by V. A target
// outside [0,V) that is not ignore_index is MOE_BAD_INDEX, and its row is treated as ignored: zeros.
// Rows of odd V start at any address. The vectors of a row are those of an aligned matrix; if the matrix itself is not
// aligned they are read element by element, so that the result does not know the address.
#include <cmath>

#include "common.cuh"

// sum over the values seen of exp(x - top), where top is their maximum.
struct running_sum {
    float top = -INFINITY, sum = 0;
};
// What is subtracted before exp. A row that is masked so far has top = -inf, and -inf - -inf would be NaN.
static __device__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

template <int n>
static __device__ void add(running_sum &r, const float (&x)[n]) {
    float top = r.top;
    for (int i = 0; i < n; i++) top = fmaxf(top, x[i]);
    const float base = base_of(top);
    float sum = r.sum * expf(r.top - base);
    for (int i = 0; i < n; i++) sum += expf(x[i] - base);
    r = {top, sum};
}

// 16 bytes at p: at once if `whole`.
template <class T>
static __device__ vec16<T> load(const T *p, bool whole) {
    if (whole) return *reinterpret_cast<const vec16<T> *>(p);
    vec16<T> x;
    for (int i = 0; i < x.n; i++) x.v[i] = p[i];
    return x;
}
template <class T>
static __device__ void store(T *p, const vec16<T> &x, bool whole) {
    if (whole) *reinterpret_cast<vec16<T> *>(p) = x;
    else for (int i = 0; i < x.n; i++) p[i] = x.v[i];
}

template <class T>
__global__ void __launch_bounds__(512, 3)
xent_kernel(int64_t V, int64_t ignore_index, float grad_scale, bool whole, const int64_t *targets_M, T *logits_MV,
            float *loss_M, float *lse_M, verdict complain) {
    constexpr int n = vec16<T>::n;
    float *shared = reinterpret_cast<float *>(shared_memory());
    const int64_t m = blockIdx.x, target = targets_M[m];
    T *row = logits_MV + m * V;
    const bool wrong = target != ignore_index && (target < 0 || target >= V);
    const bool counts = target != ignore_index && !wrong;
    if (wrong && threadIdx.x == 0) complain(MOE_BAD_INDEX, m);

    // A row is `head` single values, `vectors`, and fewer than n more single values: at most one per thread.
    const int64_t head = min64((n - m * V % n) % n, V), vectors = (V - head) / n;
    const bool single = threadIdx.x < V - vectors * n;
    const int64_t single_v = threadIdx.x < head ? threadIdx.x : threadIdx.x + vectors * n;

    running_sum mine;
    float at_target = 0;
    if (counts) {
        at_target = to_float(row[target]);
        if (single) add<1>(mine, {to_float(row[single_v])});
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
            const vec16<T> x = load(row + head + i * n, whole);
            float value[n];
            for (int j = 0; j < n; j++) value[j] = to_float(x.v[j]);
            add(mine, value);
        }
    }
    const float base = base_of(block_max(mine.top, shared));
    const float sum = block_sum(mine.sum * expf(mine.top - base), shared), scale = 1 / sum;
    if (threadIdx.x == 0) {
        loss_M[m] = counts ? base - at_target + logf(sum) : 0;
        lse_M[m] = counts ? base + logf(sum) : 0;
    }

    const auto gradient = [=](T x, bool hit) {
        return from_float<T>(grad_scale * (expf(to_float(x) - base) * scale - (hit ? 1.0f : 0.0f)));
    };
    if (single) row[single_v] = counts ? gradient(row[single_v], single_v == target) : from_float<T>(0);
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        const int64_t v = head + i * n;
        const int hit = static_cast<int>(min64(max64(target - v, -1), n));      // which of the n is the target, if any
        vec16<T> x = {};
        if (counts) {
            x = load(row + v, whole);
            for (int j = 0; j < n; j++) x.v[j] = gradient(x.v[j], j == hit);
        }
        store(row + v, x, whole);
    }
}

// At least four vectors for each thread, so that they outlast the reductions; never fewer threads than single values.
static int row_threads(int64_t vectors) { return static_cast<int>(max64(64, min64(512, round_up(vectors / 4, 32)))); }

int moe_xent(int dtype, int64_t M, int64_t V, int64_t ignore_index, double grad_scale, const int64_t *targets_M,
             void *logits_MV, void *loss_M, void *lse_M, cudaStream_t stream) {
    return by_float(dtype, [&]<class T>(T) {
        if (M < 0 || V < 1 || M > INT64_MAX / 8 / V) return static_cast<int>(MOE_BAD_SHAPE);
        return launch(xent_kernel<T>, M, row_threads(V / vec16<T>::n), 32 * sizeof(float), stream, V, ignore_index,
                      grad_scale, aligned16(logits_MV), targets_M, static_cast<T *>(logits_MV),
                      static_cast<float *>(loss_M), static_cast<float *>(lse_M), verdict_of(OP_xent));
    });
}
