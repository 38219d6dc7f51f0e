// balance.cu: the twins of csrc/balance.c: what keeps experts evenly loaded.
//
//   capacity      in scope g, S rows, an expert keeps capacity[g] copies, the rest become -1: as in the C core
//   balance loss  per scope g, from counts_GE and the mean score per expert m_e = mean_{t in g} scores[t,e]:
//                 switch  E / (S*K) * sum_e counts[g,e] * m_e     mse  mean_e (m_e - 1/E)^2     then the mean over g
//   z-loss        mean_t logsumexp(logits[t])^2
//   select bias   bias += rate * sign(mean(counts) - counts)
//
// A scope is S consecutive rows, T = G*S. E <= MOE_MAX_EXPERTS. Losses and dloss are one float each. Sums over rows run
// in double, in an order that the sizes alone decide.
// An id outside [-1,E) is MOE_BAD_INDEX at its flat position and counts as -1; a priority of NaN is MOE_BAD_VALUE at
// its own, a capacity below 0 at its scope, where it counts as 0. A count that select_bias_update cannot add is
// MOE_BAD_VALUE at its expert, and no bias moves.
#include <cmath>

#include "../csrc/vmath.h"
#include "common.cuh"

static int check_rows(int dtype, int64_t T, int64_t E) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    return T < 0 || E < 1 || E > MOE_MAX_EXPERTS || T > INT64_MAX / (8 * E) ? MOE_BAD_SHAPE : MOE_OK;
}
static int check_scopes(int64_t T, int64_t S, int64_t K, int64_t E) {
    if (T < 0 || S < 0 || (S == 0 ? T != 0 : T % S != 0)) return MOE_BAD_SHAPE;
    if (K < 1 || K > E || S > INT32_MAX / K) return MOE_BAD_SHAPE;
    return check_rows(MOE_F32, T, E);
}
static int64_t scopes(int64_t T, int64_t S) { return T ? T / S : 0; }

static __device__ bool is_here(int id, int64_t E, int64_t flat, verdict bad) {
    if (id < -1 || id >= E) bad(MOE_BAD_INDEX, flat);
    return id >= 0 && id < E;
}

// ---- capacity -------------------------------------------------------------------------------------------------------
// A block per scope and expert looks through all ids of the scope: E passes over ids that stay in the cache, but no
// memory beside the ids. It finds the C-th best of its copies digit by digit, from a histogram of the next 8 bits of
// those that have begun like it; then copies below it are dropped, and of its equals all but the first few.
struct capacity_job {
    int64_t        tasks;                       // G*E
    int            copies, E;                   // copies of a scope: S*K
    const int32_t *ids_TK;
    const float   *priority_TK;                 // NULL: all are equal
    const int32_t *capacity_G;
    int32_t       *kept_TK;
};

__global__ void admit_kernel(int64_t N, int64_t G, int64_t E, const int32_t *ids_N, const float *priority_N,
                             const int32_t *capacity_G, int32_t *kept_N, verdict bad) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t f = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; f < N; f += stride) {
        kept_N[f] = is_here(ids_N[f], E, f, bad) ? ids_N[f] : -1;
        if (priority_N && std::isnan(priority_N[f])) bad(MOE_BAD_VALUE, f);
        if (f < G && capacity_G[f] < 0) bad(MOE_BAD_VALUE, f);
    }
}

// Larger for a larger x, the same for both zeros.
static __device__ uint32_t order_of(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return u >> 31 ? ~u : u | 0x80000000u;
}

enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS };
struct capacity_space {
    int counts[DIGITS];         // of copies by digit, the largest digit first
    int digit, left;            // the digit of the last copy that stays, and how many of that digit stay; or -1
    int ties[32];               // per warp
};

// By one warp: in which digit is the left-th copy?
static __device__ void pick_digit(capacity_space *space, int left) {
    enum { EACH = DIGITS / 32 };
    const int *const counts = space->counts + lane_id() * EACH;
    int sum = 0;
    for (int d = 0; d < EACH; d++) sum += counts[d];
    int until = sum;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, until, step);
        if (lane_id() >= step) until += before;
    }
    if (until < left || until - sum >= left) return;
    left -= until - sum;
    int d = 0;
    while (counts[d] < left) left -= counts[d++];
    space->digit = DIGITS - 1 - (lane_id() * EACH + d);
    space->left = left;
}

__global__ void __launch_bounds__(1024) drop_kernel(capacity_job job) {
    auto *const space = reinterpret_cast<capacity_space *>(shared_memory());
    const int warps = blockDim.x / 32, part = static_cast<int>(round_up(ceil_div(job.copies, warps), 32));
    for (int64_t task = blockIdx.x; task < job.tasks; task += gridDim.x) {
        const int64_t scope = task / job.E * job.copies;
        const int     capacity = static_cast<int>(max64(job.capacity_G[task / job.E], 0));
        if (capacity >= job.copies) continue;
        const int     own = static_cast<int>(task % job.E);
        const int32_t *const __restrict__ ids = job.ids_TK + scope;
        // Without a place all are equal: there is no last copy that stays.
        const float *const priority = job.priority_TK && capacity ? job.priority_TK + scope : nullptr;
        const auto order = [&](int f) { return priority ? order_of(priority[f]) : 0; };
        uint32_t last = 0;                      // the order of the last copy that stays,
        int      left = capacity;               // and how many of that order do
        bool     drops = true;

        if (threadIdx.x == 0) space->digit = -1;
        for (int shift = 32 - DIGIT_BITS; priority && drops && shift >= 0; shift -= DIGIT_BITS) {
            for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) space->counts[d] = 0;
            __syncthreads();
#pragma unroll 4
            for (int f = threadIdx.x; f < job.copies; f += blockDim.x) {
                if (ids[f] != own || (order(f) ^ last) >> shift >> DIGIT_BITS) continue;
                atomicAdd(&space->counts[DIGITS - 1 - (order(f) >> shift) % DIGITS], 1);
            }
            __syncthreads();
            if (warp_id() == 0) pick_digit(space, left);
            __syncthreads();
            drops = space->digit >= 0;          // else there are fewer copies than places
            last |= static_cast<uint32_t>(space->digit) << shift;
            left = space->left;
        }

        if (drops) {                            // each warp takes one part of the scope, in order
            const int begin = warp_id() * part;
            const int end = static_cast<int>(min64(begin + static_cast<int64_t>(part), job.copies));
            int ties = 0;
            for (int f = begin + lane_id(); f < end; f += 32) ties += ids[f] == own && order(f) == last;
            ties = warp_sum(ties);
            if (lane_id() == 0) space->ties[warp_id()] = ties;
            __syncthreads();
            int rank = 0;
            for (int w = 0; w < warp_id(); w++) rank += space->ties[w];
            for (int first = begin; first < end; first += 32) {
                const int  f = first + lane_id();
                const bool mine = f < end && ids[f] == own, tie = mine && order(f) == last;
                const uint32_t all = __ballot_sync(0xffffffffu, tie);
                const bool late = rank + __popc(all & ((1u << lane_id()) - 1)) >= left;
                if (tie ? late : mine && order(f) < last) job.kept_TK[scope + f] = -1;
                rank += __popc(all);
            }
        }
        __syncthreads();
    }
}

static int drop_threads(int64_t copies) { return static_cast<int>(min64(max64(round_up(copies / 4, 32), 32), 1024)); }

size_t moe_capacity_workspace(int64_t, int64_t, int64_t, cudaStream_t) { return 0; }

int moe_capacity(int dtype, int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, const void *priority_TK,
                 const int32_t *capacity_G, void *, int32_t *kept_TK, cudaStream_t stream) {
    TRY(check_rows(dtype, 0, 1));
    TRY(check_scopes(T, S, K, E));
    auto *const priority = static_cast<const float *>(priority_TK);
    TRY(launch(admit_kernel, strided_grid(T * K, 256), 256, 0, stream, T * K, scopes(T, S), E, ids_TK, priority,
               capacity_G, kept_TK, verdict_of(OP_capacity)));
    const capacity_job job = {scopes(T, S) * E, static_cast<int>(S * K), static_cast<int>(E),
                              ids_TK, priority, capacity_G, kept_TK};
    return launch(drop_kernel, strided_grid(job.tasks, 1), drop_threads(S * K), sizeof(capacity_space), stream, job);
}

// ---- counts ---------------------------------------------------------------------------------------------------------
enum { COUNTED = 4096 };        // copies of one scope that a block counts before it adds to counts_GE
__global__ void counts_kernel(int copies, int pieces, int E, const int32_t *ids_TK, int32_t *counts_GE, verdict bad) {
    auto *const counts_E = reinterpret_cast<int *>(shared_memory());
    const int64_t scope = static_cast<int>(blockIdx.x) / pieces;
    const int     begin = static_cast<int>(blockIdx.x) % pieces * COUNTED;
    for (int e = threadIdx.x; e < E; e += blockDim.x) counts_E[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTED && i < copies - begin; i += blockDim.x) {
        const int64_t f = scope * copies + begin + i;
        if (is_here(ids_TK[f], E, f, bad)) atomicAdd(&counts_E[ids_TK[f]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        if (counts_E[e]) atomicAdd(&counts_GE[scope * E + e], counts_E[e]);
}

int moe_balance_counts(int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, int32_t *counts_GE,
                       cudaStream_t stream) {
    TRY(check_scopes(T, S, K, E));
    const int64_t G = S ? T / S : 1, pieces = ceil_div(S * K, COUNTED);          // no tokens: one empty scope
    if (G == 0) return MOE_OK;
    TRY(cuda_status(cudaMemsetAsync(counts_GE, 0, static_cast<size_t>(G * E) * sizeof *counts_GE, stream),
                    "clearing counts"));
    return launch(counts_kernel, G * pieces, 256, static_cast<size_t>(E) * sizeof(int), stream, S * K, pieces, E,
                  ids_TK, counts_GE, verdict_of(OP_balance_counts));
}

// ---- balance loss ---------------------------------------------------------------------------------------------------
// Sums over the rows of a scope: blocks of columns x lanes threads sum pieces of it, one more round sums the pieces.
struct summing {
    int64_t rows, piece;                        // of a scope, of a piece
    int     E, columns, lanes, across, pieces;
};
enum { ROWS_OF_LANE = 32 };
static summing summing_of(int64_t rows, int64_t E, bool at_once) {
    const int64_t across = ceil_div(E, 256), columns = ceil_div(E, across);
    int64_t lanes = 1;
    while (2 * lanes * columns <= 1024 && 2 * lanes <= rows) lanes *= 2;
    const int64_t piece = at_once ? max64(rows, 1) : lanes * ROWS_OF_LANE;
    return {rows, piece, static_cast<int>(E), static_cast<int>(columns), static_cast<int>(lanes),
            static_cast<int>(across), static_cast<int>(ceil_div(rows, piece))};
}

template <class X>
static __device__ double as_double(X x) { return to_float(x); }
static __device__ double as_double(double x) { return x; }

// x_GSE: G scopes of s.rows rows -> sums_GpE.
template <class X>
__global__ void __launch_bounds__(1024) sum_rows_kernel(summing s, const X *__restrict__ x, double *__restrict__ sums) {
    auto *const shared = reinterpret_cast<double *>(shared_memory());
    const int     lane = static_cast<int>(threadIdx.x) / s.columns;
    const int     e = static_cast<int>(blockIdx.x) % s.across * s.columns + static_cast<int>(threadIdx.x) % s.columns;
    const int64_t piece = static_cast<int>(blockIdx.x) / s.across;              // of all scopes
    const int64_t scope = piece / s.pieces, first = piece % s.pieces * s.piece, end = min64(first + s.piece, s.rows);
    const bool    has_rows = lane < s.lanes && e < s.E;
    double sum = 0;
    x += scope * s.rows * s.E + e;
#pragma unroll 8
    for (int64_t r = first + lane; has_rows && r < end; r += s.lanes) sum += as_double(x[r * s.E]);
    shared[threadIdx.x] = sum;
    for (int half = s.lanes / 2; half; half /= 2) {
        __syncthreads();
        if (lane < half) shared[threadIdx.x] = sum += shared[threadIdx.x + half * s.columns];
    }
    if (lane == 0 && has_rows) sums[piece * s.E + e] = sum;
}

struct balance_space {
    double *pieces_GpE, *sums_GE;
    void   *dscores_GE;                         // a row per scope: the gradient of its rows
    size_t  bytes;
};
static balance_space balance_carve(int64_t T, int64_t S, int64_t E, void *workspace) {
    const int64_t G = scopes(T, S), pieces = summing_of(S, E, false).pieces;
    auto *const sums_GE = static_cast<double *>(workspace);
    auto *const dscores_GE = sums_GE + round_up(G * E, 2);
    auto *const pieces_GpE = dscores_GE + round_up(G * E, 2);
    return {pieces_GpE, sums_GE, dscores_GE, static_cast<size_t>(2 * round_up(G * E, 2) + G * pieces * E) * 8};
}
size_t moe_balance_loss_workspace(int64_t T, int64_t S, int64_t E, cudaStream_t) {
    return balance_carve(T, S, E, nullptr).bytes;
}

template <class X>
static int sum_rows(const summing &s, int64_t G, const X *x, double *sums, cudaStream_t stream) {
    const int threads = static_cast<int>(round_up(s.columns * s.lanes, 32));
    return launch(sum_rows_kernel<X>, G * s.pieces * s.across, threads, static_cast<size_t>(threads) * sizeof(double),
                  stream, s, x, sums);
}
static int sum_scores(int dtype, int64_t G, int64_t S, int64_t E, const void *scores_TE, const balance_space &space,
                      cudaStream_t stream) {
    const summing s = summing_of(S, E, false);
    double *const to = s.pieces > 1 ? space.pieces_GpE : space.sums_GE;
    TRY(by_float(dtype, [&]<class X>(X) { return sum_rows(s, G, static_cast<const X *>(scores_TE), to, stream); }));
    if (s.pieces == 1) return MOE_OK;
    return sum_rows<double>(summing_of(s.pieces, E, true), G, space.pieces_GpE, space.sums_GE, stream);
}

struct balance_rule {
    bool    mse;
    int64_t G, S, K, E;
};
__global__ void __launch_bounds__(1024)
balance_loss_kernel(balance_rule rule, const double *sums_GE, const int32_t *counts_GE, float *loss) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < rule.G * rule.E; i += blockDim.x) {
        const double mean = sums_GE[i] / static_cast<double>(rule.S), off = mean - 1.0 / static_cast<double>(rule.E);
        sum += rule.mse ? off * off : counts_GE[i] * mean;
    }
    sum = block_sum(sum, reinterpret_cast<double *>(shared_memory()));
    if (threadIdx.x != 0) return;
    const double scale = rule.mse ? 1.0 / static_cast<double>(rule.E)
                                  : static_cast<double>(rule.E) / static_cast<double>(rule.S * rule.K);
    *loss = static_cast<float>(rule.G ? sum * scale / static_cast<double>(rule.G) : 0);
}

static int check_balance(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E) {
    TRY(check_rows(dtype, 0, 1));
    if (form != MOE_BALANCE_SWITCH && form != MOE_BALANCE_MSE) return MOE_BAD_VALUE;
    return check_scopes(T, S, K, E);
}

int moe_balance_loss(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                     const int32_t *counts_GE, void *workspace, void *loss, cudaStream_t stream) {
    TRY(check_balance(dtype, form, T, S, K, E));
    const balance_space space = balance_carve(T, S, E, workspace);
    const balance_rule  rule = {form == MOE_BALANCE_MSE, scopes(T, S), S, K, E};
    TRY(sum_scores(dtype, rule.G, S, E, scores_TE, space, stream));
    return launch(balance_loss_kernel, 1, 1024, 32 * sizeof(double), stream, rule, space.sums_GE, counts_GE,
                  static_cast<float *>(loss));
}

// Forward was: loss = 1/G sum_g E/(S*K) sum_e counts[g,e] * m_e, or 1/G sum_g 1/E sum_e (m_e - 1/E)^2, with
// m_e = 1/S sum_t scores[t,e]; so every row of a scope has the same gradient. It is made once and spread.
template <class T>
__global__ void balance_gradient_kernel(balance_rule rule, const double *sums_GE, const int32_t *counts_GE,
                                        const float *dloss, T *dscores_GE) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rule.G * rule.E) return;
    const double S = static_cast<double>(rule.S), E = static_cast<double>(rule.E);
    const double dmean = rule.mse ? 2 * (sums_GE[i] / S - 1.0 / E) / E
                                  : E / (S * static_cast<double>(rule.K)) * counts_GE[i];
    dscores_GE[i] = from_float<T>(static_cast<float>(*dloss * dmean / (static_cast<double>(rule.G) * S)));
}

// y[t] = row_G[t / S]; rows of `width` V, `rows` to a block.
template <class V>
__global__ void spread_kernel(int64_t T, int64_t S, int width, int rows, const V *__restrict__ row_G,
                              V *__restrict__ y_T) {
    const int64_t  row = static_cast<int64_t>(blockIdx.x) * rows, scope = row / S;
    const uint32_t within = static_cast<uint32_t>(row % S);
    const int      n = static_cast<int>(min64(rows, T - row)) * width;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const int64_t from = scope + (within + i / width) / static_cast<uint32_t>(S);
        y_T[row * width + i] = row_G[from * width + i % width];
    }
}
template <class V>
static int spread(int64_t T, int64_t S, int64_t width, const void *row_G, void *y_T, cudaStream_t stream) {
    const int64_t rows = max64(1, 1024 / width);
    return launch(spread_kernel<V>, ceil_div(T, rows), 256, 0, stream, T, S, width, rows,
                  static_cast<const V *>(row_G), static_cast<V *>(y_T));
}

int moe_balance_loss_backward(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                              const int32_t *counts_GE, const void *dloss, void *workspace, void *dscores_TE,
                              cudaStream_t stream) {
    TRY(check_balance(dtype, form, T, S, K, E));
    const balance_space space = balance_carve(T, S, E, workspace);
    const balance_rule  rule = {form == MOE_BALANCE_MSE, scopes(T, S), S, K, E};
    if (rule.mse) TRY(sum_scores(dtype, rule.G, S, E, scores_TE, space, stream));
    return by_float(dtype, [&]<class X>(X) {
        TRY(launch(balance_gradient_kernel<X>, ceil_div(rule.G * E, 256), 256, 0, stream, rule, space.sums_GE,
                   counts_GE, static_cast<const float *>(dloss), static_cast<X *>(space.dscores_GE)));
        return E % vec16<X>::n == 0 && aligned16(dscores_TE)
                   ? spread<vec16<X>>(T, S, E / vec16<X>::n, space.dscores_GE, dscores_TE, stream)
                   : spread<X>(T, S, E, space.dscores_GE, dscores_TE, stream);
    });
}

// ---- z-loss: a warp per row -----------------------------------------------------------------------------------------
enum { Z_ROWS = 8 };
struct softmax_norm {
    float max, sum;             // exp(x - max) / sum; -inf weighs nothing, NaN and +inf make the sum NaN
};
template <class T>
static __device__ softmax_norm norm_of(const T *x_E, int64_t E) {
    float max = -INFINITY, sum = 0;
    for (int64_t e = lane_id(); e < E; e += 32) max = fmaxf(max, to_float(x_E[e]));
    max = warp_max(max);
    if (max == -INFINITY) max = 0;
    for (int64_t e = lane_id(); e < E; e += 32) sum += vexp_f32(to_float(x_E[e]) - max);
    return {max, warp_sum(sum)};
}

template <class T>
__global__ void lse_kernel(int64_t rows, int64_t E, const T *__restrict__ logits_TE, float *__restrict__ lse_T) {
    const int64_t t = static_cast<int64_t>(blockIdx.x) * Z_ROWS + warp_id();
    if (t >= rows) return;
    const softmax_norm norm = norm_of(logits_TE + t * E, E);
    if (lane_id() == 0) lse_T[t] = norm.max + logf(norm.sum);
}
__global__ void __launch_bounds__(1024) z_loss_kernel(int64_t T, const float *lse_T, float *loss) {
    double sum = 0;
#pragma unroll 8
    for (int64_t t = threadIdx.x; t < T; t += blockDim.x) sum += static_cast<double>(lse_T[t]) * lse_T[t];
    sum = block_sum(sum, reinterpret_cast<double *>(shared_memory()));
    if (threadIdx.x == 0) *loss = static_cast<float>(T ? sum / static_cast<double>(T) : 0);
}

int moe_z_loss(int dtype, int64_t T, int64_t E, const void *logits_TE, void *lse_T, void *loss, cudaStream_t stream) {
    TRY(check_rows(dtype, T, E));
    auto *const lse = static_cast<float *>(lse_T);
    TRY(by_float(dtype, [&]<class X>(X) {
        return launch(lse_kernel<X>, ceil_div(T, Z_ROWS), 32 * Z_ROWS, 0, stream, T, E,
                      static_cast<const X *>(logits_TE), lse);
    }));
    return launch(z_loss_kernel, 1, 1024, 32 * sizeof(double), stream, T, lse, static_cast<float *>(loss));
}

// Forward was: loss = 1/T sum_t lse_t^2, and dlse/dlogit = softmax.
template <class T>
__global__ void z_loss_backward_kernel(int64_t rows, int64_t E, const T *__restrict__ logits_TE, const float *lse_T,
                                       const float *dloss, T *__restrict__ dlogits_TE) {
    const int64_t t = static_cast<int64_t>(blockIdx.x) * Z_ROWS + warp_id();
    if (t >= rows) return;
    const softmax_norm norm = norm_of(logits_TE + t * E, E);
    const float dlse = static_cast<float>(2.0 * *dloss * lse_T[t] / static_cast<double>(rows));
    for (int64_t e = lane_id(); e < E; e += 32)
        dlogits_TE[t * E + e] =
            from_float<T>(dlse * (vexp_f32(to_float(logits_TE[t * E + e]) - norm.max) / norm.sum));
}

int moe_z_loss_backward(int dtype, int64_t T, int64_t E, const void *logits_TE, const void *lse_T, const void *dloss,
                        void *dlogits_TE, cudaStream_t stream) {
    TRY(check_rows(dtype, T, E));
    return by_float(dtype, [&]<class X>(X) {
        return launch(z_loss_backward_kernel<X>, ceil_div(T, Z_ROWS), 32 * Z_ROWS, 0, stream, T, E,
                      static_cast<const X *>(logits_TE), static_cast<const float *>(lse_T),
                      static_cast<const float *>(dloss), static_cast<X *>(dlogits_TE));
    });
}

// ---- selection bias -------------------------------------------------------------------------------------------------
// mean - counts[e] has the sign of total - E * counts[e]: integers, so that every rank decides alike.
__global__ void __launch_bounds__(1024)
select_bias_kernel(int64_t E, double rate, const int64_t *counts_E, float *bias_E, verdict bad) {
    auto *const shared = reinterpret_cast<int64_t *>(shared_memory());
    int64_t total = 0, refused = 0;
    for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
        const bool counts = counts_E[e] >= 0 && counts_E[e] <= INT64_MAX / (2 * MOE_MAX_EXPERTS);
        if (!counts) bad(MOE_BAD_VALUE, e);
        else total += counts_E[e];
        refused += !counts;
    }
    total = block_sum(total, shared);
    if (block_sum(refused, shared)) return;
    for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
        const int sign = (total > E * counts_E[e]) - (total < E * counts_E[e]);
        bias_E[e] += static_cast<float>(rate * sign);
    }
}

int moe_select_bias_update(int64_t E, double rate, const int64_t *counts_E, float *bias_E, cudaStream_t stream) {
    if (E < 1 || E > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    if (!std::isfinite(rate)) return MOE_BAD_VALUE;
    return launch(select_bias_kernel, 1, 1024, 32 * sizeof(int64_t), stream, E, rate, counts_E, bias_E,
                  verdict_of(OP_select_bias_update));
}
