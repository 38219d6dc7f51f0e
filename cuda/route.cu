// route.cu: the twins of csrc/route.c: which experts a token goes to and with what weight.
//
//   score            scores = ...          ids = the K largest ...      u = ...
//   softmax_topk     softmax(logits)       scores + select_bias         scores[ids]
//   topk_softmax     softmax(logits)       logits                       softmax(logits[ids])
//   sigmoid          sigmoid(logits)       scores + select_bias         scores[ids]
//   weights = scale * u / |u|_p
//
// Forced ids take the place of the K largest, and all else follows. -1 is absent: u is 0, in the softmax and the norm
// too, and nothing comes back from it.
//
// The softmax has the bits of the C core's (one exp, one order of summation), and a score and its bias are added in
// double as there, so both choose the same experts, ties included. sigmoid differs in its last bit; without a bias its
// logits are compared, which it keeps in order. Weights and gradients are float where the C core has double: K terms
// each, and a double is up to 64 times slower here.
//
// A row with NaN, +inf or fewer than K unmasked logits (any masked one if balanced), or under a select_bias that is not
// finite, is MOE_BAD_VALUE: its scores and weights are NaN, its ids those of equal logits. A forced id that is neither
// -1 nor in [0,E), or that repeats one of its row, is MOE_BAD_INDEX and becomes -1. In the backward an id outside [-1,E)
// is MOE_BAD_INDEX and its row's gradient zero; a row's ids are distinct.
//
// Forward: up to E = 512 and K = 32 a group of 8 or 32 lanes per row, its keys in registers; beyond, a block per row,
// which sorts. Backward: a warp per row.
#include <cmath>
#include <type_traits>

#include "../csrc/vmath.h"
#include "common.cuh"

struct router_rule {
    int     score;
    bool    balanced;
    int     E, K;
    int64_t T;
    float   p, scale;       // p = 0: no norm
};

static int check_router(const moe_router_args &a, router_rule *rule) {
    if (a.T < 0 || a.E < 1 || a.E > MOE_MAX_EXPERTS || a.T > INT64_MAX / (8 * a.E)) return MOE_BAD_SHAPE;
    if (a.K < 1 || a.K > a.E) return MOE_BAD_SHAPE;
    if (a.score != MOE_SOFTMAX_TOPK && a.score != MOE_TOPK_SOFTMAX && a.score != MOE_SIGMOID) return MOE_BAD_VALUE;
    if (!(a.norm_p >= 0) || !std::isfinite(a.scale)) return MOE_BAD_VALUE;
    *rule = {a.score, a.balanced != 0, static_cast<int>(a.E), static_cast<int>(a.K), a.T,
             static_cast<float>(a.norm_p), static_cast<float>(a.scale)};
    return MOE_OK;
}

// ---- a group of W lanes ---------------------------------------------------------------------------------------------
// All lanes of a warp call these together, whatever their group.

template <int W>
static __device__ int group_lane() { return threadIdx.x % W; }
template <int W, class X>
static __device__ X group_sum(X x) {
    for (int step = W / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
template <int W>
static __device__ float group_max(float x) {
    for (int step = W / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
template <int W>
static __device__ uint32_t group_max(uint32_t x) {
    if constexpr (W == 32) {
        x = __reduce_max_sync(0xffffffffu, x);
    } else {
        for (int step = W / 2; step; step /= 2) {
            const uint32_t other = __shfl_xor_sync(0xffffffffu, x, step);
            x = x > other ? x : other;
        }
    }
    return x;
}
template <int W>
static __device__ uint64_t group_max(uint64_t x) {
    const uint32_t high = x >> 32, top = group_max<W>(high);
    return static_cast<uint64_t>(top) << 32 | group_max<W>(high == top ? static_cast<uint32_t>(x) : 0u);
}

// Over k of f(k), which itself calls none of these.
template <int W, class F>
static __device__ float sum_over(int K, F f) {
    float sum = 0;
#pragma unroll 1
    for (int k = group_lane<W>(); k < K; k += W) sum += f(k);
    return group_sum<W>(sum);
}
template <int W, class F>
static __device__ float max_over(int K, F f) {
    float top = -INFINITY;
#pragma unroll 1
    for (int k = group_lane<W>(); k < K; k += W) top = fmaxf(top, f(k));
    return group_max<W>(top);
}

// ---- scores and what the choice compares ----------------------------------------------------------------------------

// Summed over a row: the number of unmasked logits, negative if one is NaN or +inf.
static __device__ int unmasked(float x) { return x < INFINITY ? x > -INFINITY : -MOE_MAX_EXPERTS; }
static __device__ int finite_bias(float bias) { return fabsf(bias) < INFINITY ? 0 : -MOE_MAX_EXPERTS; }

// Near 1 the double keeps what is missing to it.
template <class Real>
static __device__ Real sigmoid(float x) {
    const float e = vexp_f32(-fabsf(x)), tail = e / (1 + e);
    return x < 0 ? Real(tail) : 1 - Real(tail);
}

// The larger is chosen. Masked experts lose to all others, whatever their bias. float is enough without a bias. Where
// sigmoid is 1 or 0 even in double, the C core sees equal scores.
template <bool biased, class Real = std::conditional_t<biased, double, float>>
static __device__ Real choice(int form, float x, float score, float bias) {
    if (form == MOE_TOPK_SOFTMAX || x == -INFINITY) return x;
    if constexpr (biased) return (form == MOE_SIGMOID ? sigmoid<Real>(x) : Real{score}) + bias;
    else                  return form == MOE_SIGMOID ? fmaxf(fminf(x, 36.7368f), -709.78f) : score;
}

// Integers in the order of x, above 0, which is the key of nothing; -0 and 0 are equal.
static __device__ uint32_t ordered(float x) {
    uint32_t u;
    x += 0.0f;
    memcpy(&u, &x, sizeof u);
    return u ^ (static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 1u << 31);
}
static __device__ uint64_t ordered(double x) {
    uint64_t u;
    x += 0.0;
    memcpy(&u, &x, sizeof u);
    return u ^ (static_cast<uint64_t>(static_cast<int64_t>(u) >> 63) | 1ull << 63);
}

// ---- weights of the chosen ------------------------------------------------------------------------------------------

// k -> u_k. value(k): the k-th choice's score, or its logit for topk_softmax; of an absent one 0, or -INFINITY.
template <int W, class Value>
static __device__ auto kept_weights(const router_rule &rule, Value value) {
    const bool softmax = rule.score == MOE_TOPK_SOFTMAX;
    float top = softmax ? max_over<W>(rule.K, value) : 0;
    top = top > -INFINITY ? top : 0;
    float sum = softmax ? sum_over<W>(rule.K, [=](int k) { return vexp_f32(value(k) - top); }) : 1;
    sum = sum == 0 ? 1 : sum;                               // all absent
    return [=](int k) { return softmax ? vexp_f32(value(k) - top) / sum : value(k); };
}

// |u|_p of u >= 0, scaled by the largest entry so that no power underflows. p = INFINITY is the maximum, p = 0 no norm.
template <int W, class U>
static __device__ float p_norm(float p, int K, U u) {
    if (p == 0) return 1;
    if (p == 1) return sum_over<W>(K, u);
    const float top = max_over<W>(K, u), unit = top > 0 ? top : 1;
    if (p == INFINITY) return top;
    return top * powf(sum_over<W>(K, [=](int k) { return powf(u(k) / unit, p); }), 1 / p);
}

template <int W, class T, class Value>
static __device__ void store_weights(const router_rule &rule, bool live, Value value, T *weights_K) {
    const auto u = kept_weights<W>(rule, value);
    const float norm = p_norm<W>(rule.p, rule.K, u);
#pragma unroll 1
    for (int k = group_lane<W>(); k < rule.K && live; k += W)
        weights_K[k] = from_float<T>(norm > 0 ? rule.scale * u(k) / norm : 0 * u(k));      // NaN stays NaN
}

// Whether the k-th of a row's forced ids is wrong: out of range, or the second of its kind.
static __device__ bool bad_choice(const int32_t *ids_K, int k, int E) {
    const int id = ids_K[k];
    bool bad = id < -1 || id >= E;
    for (int j = 0; j < k && id >= 0; j++) bad |= ids_K[j] == id;
    return bad;
}

// ---- forward, in registers ------------------------------------------------------------------------------------------

// Lane l of a group holds experts l*V .. l*V + V-1, so that of equal keys the lowest lane has the lowest id. Loops over
// i are unrolled, so that arrays of V are registers.

// 16 bytes at once, or V elements if they are fewer.
template <class T, int V>
struct alignas(V < vec16<T>::n ? V * sizeof(T) : 16) vec {
    static constexpr int n = V < vec16<T>::n ? V : vec16<T>::n;
    T v[n];
};

// x = the n <= V elements at `from`, then -inf; in vectors if n is 0 or V and `from` is aligned.
template <int V, class T>
static __device__ void load_run(const T *from, int n, bool vectors, float (&x)[V]) {
    using piece = vec<T, V>;
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = -INFINITY;
    if (vectors && n > 0) {
#pragma unroll
        for (int i = 0; i < V; i += piece::n) {
            const piece some = *reinterpret_cast<const piece *>(from + i);
#pragma unroll
            for (int j = 0; j < piece::n; j++) x[i + j] = to_float(some.v[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++)
            if (i < n) x[i] = to_float(from[i]);
    }
}
template <int V, class T>
static __device__ void store_run(T *to, int n, bool vectors, const float (&x)[V]) {
    using piece = vec<T, V>;
    if (vectors && n > 0) {
#pragma unroll
        for (int i = 0; i < V; i += piece::n) {
            piece some;
#pragma unroll
            for (int j = 0; j < piece::n; j++) some.v[j] = from_float<T>(x[i + j]);
            *reinterpret_cast<piece *>(to + i) = some;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++)
            if (i < n) to[i] = from_float<T>(x[i]);
    }
}

// In the order of csrc/softmax.inc: 16 parts by e mod 16, each in the order of e, then the parts in theirs. row_E: of
// the group, W*V floats.
template <int W, int V>
static __device__ float sum_of_row(const float (&p)[V], float *row_E) {
    const int lane = group_lane<W>();
    float part = 0, sum = 0;
    store_run(row_E + lane * V, V, true, p);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < W * V; e += 16) part += row_E[e + lane % 16];
#pragma unroll
    for (int l = 0; l < (W < 16 ? W : 16); l++) sum += __shfl_sync(0xffffffffu, part, lane_id() - lane + l);
    __syncwarp();                                           // the row may be overwritten
    return sum;
}

// Falling keys; equal ones stay in the order of their ids.
template <class Key, int V>
static __device__ void sort_run(Key (&key)[V], int (&id)[V]) {
#pragma unroll
    for (int n = 1; n < V; n++) {
#pragma unroll
        for (int i = n; i > 0; i--) {
            const Key left = key[i - 1], right = key[i];
            const int left_id = id[i - 1], right_id = id[i];
            const bool swap = left < right;
            key[i - 1] = swap ? right : left, key[i] = swap ? left : right;
            id[i - 1] = swap ? right_id : left_id, id[i] = swap ? left_id : right_id;
        }
    }
}

// chosen_K = the ids of the group's K largest keys, the lowest first among equals. A lane offers the largest of its
// own that is left.
template <int W, class Key, int V>
static __device__ void choose(int K, Key (&key)[V], int *chosen_K) {
    const int lane = group_lane<W>();
    const uint32_t before = (1u << lane_id()) - (1u << (lane_id() - lane));
    int id[V];
#pragma unroll
    for (int i = 0; i < V; i++) id[i] = lane * V + i;
    sort_run(key, id);
#pragma unroll 1
    for (int k = 0; k < K; k++) {
        const bool largest = key[0] == group_max<W>(key[0]);
        const bool wins = !(__ballot_sync(0xffffffffu, largest) & before) && largest;
        if (wins) chosen_K[k] = id[0];
#pragma unroll
        for (int i = 0; i < V; i++) {
            key[i] = !wins ? key[i] : i + 1 < V ? key[i + 1] : 0;
            id[i] = wins && i + 1 < V ? id[i + 1] : id[i];
        }
    }
}

// Shared memory: per group W*V floats, then W ids.
template <class T, bool biased, int W, int V>
__global__ void __launch_bounds__(128)
router_kernel(router_rule rule, bool vectors, const T *logits_TE, const float *bias_E, const int32_t *forced_TK,
              T *weights_TK, int32_t *ids_TK, T *scores_TE, verdict complain) {
    using Key = std::conditional_t<biased, uint64_t, uint32_t>;
    const int E = rule.E, K = rule.K, lane = group_lane<W>(), first = lane * V;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * (blockDim.x / W) + threadIdx.x / W;
    const bool live = group < rule.T;                       // a group too many repeats the last row: it writes nothing
    const int64_t t = live ? group : rule.T - 1;
    float *row_E = reinterpret_cast<float *>(shared_memory()) + threadIdx.x / W * (W * (V + 1));
    int *chosen_K = reinterpret_cast<int *>(row_E + W * V);

    float x[V], bias[V], score[V];
    load_run(logits_TE + t * E + first, E - first, vectors, x);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < V; i++) {
        bias[i] = biased && first + i < E ? bias_E[first + i] : 0;
        finite &= fabsf(x[i]) < INFINITY && fabsf(bias[i]) < INFINITY;
    }
    if (!__all_sync(0xffffffffu, finite)) {
        int open = 0;
#pragma unroll
        for (int i = 0; i < V; i++) open += unmasked(x[i]) + finite_bias(bias[i]);
        const bool bad = group_sum<W>(open) < (rule.balanced ? E : K);
        if (bad && live && lane == 0) complain(MOE_BAD_VALUE, t * E);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = bad ? NAN : x[i], bias[i] = bad ? 0 : bias[i];
    }

    if (rule.score == MOE_SIGMOID) {
#pragma unroll
        for (int i = 0; i < V; i++) score[i] = sigmoid<float>(x[i]);
    } else {
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < V; i++) top = fmaxf(top, x[i]);
        top = group_max<W>(top);
#pragma unroll
        for (int i = 0; i < V; i++) score[i] = vexp_f32(x[i] - top);
        const float sum = sum_of_row<W>(score, row_E);
#pragma unroll
        for (int i = 0; i < V; i++) score[i] /= sum;
    }
    if (live) store_run(scores_TE + t * E + first, E - first, vectors, score);
    if (rule.score == MOE_TOPK_SOFTMAX) store_run(row_E + first, V, true, x);
    else                                store_run(row_E + first, V, true, score);

    if (forced_TK) {
        if (lane < K) {
            const bool absent = bad_choice(forced_TK + t * K, lane, E);
            if (absent && live) complain(MOE_BAD_INDEX, t * K + lane);
            chosen_K[lane] = absent ? -1 : forced_TK[t * K + lane];
        }
    } else if (rule.balanced) {
        if (lane < K) chosen_K[lane] = static_cast<int>((t * K + lane) % E);
    } else {
        Key key[V];         // those beyond E have the key of a masked expert, in a bad row that of all, and larger ids
#pragma unroll
        for (int i = 0; i < V; i++) key[i] = ordered(choice<biased>(rule.score, x[i], score[i], bias[i]));
        choose<W>(K, key, chosen_K);
    }
    __syncwarp();
    const int id = lane < K ? chosen_K[lane] : -1;
    const float value = id >= 0 ? row_E[id] : rule.score == MOE_TOPK_SOFTMAX ? -INFINITY : 0;
    if (live && lane < K) ids_TK[t * K + lane] = id;
    store_weights<W>(rule, live, [=](int) { return value; }, weights_TK + t * K);
}

// ---- forward, any E and K -------------------------------------------------------------------------------------------

// Shared memory of a block. P: E rounded up to a power of two.
struct sorted_row {
    uint64_t *key;          // [P]
    float    *value;        // [P]
    float    *scratch;      // [32]
    uint16_t *id;           // [P]
    __device__ sorted_row(unsigned char *p, int P)
        : key(reinterpret_cast<uint64_t *>(p)), value(reinterpret_cast<float *>(key + P)), scratch(value + P),
          id(reinterpret_cast<uint16_t *>(scratch + 32)) {}
    static size_t bytes(int P) { return P * (sizeof *key + sizeof *value + sizeof *id) + 32 * sizeof *scratch; }
};

// Bitonic, by falling key and then by rising id.
static __device__ void sort(const sorted_row &row, int P) {
    for (int run = 2; run <= P; run *= 2) {
        for (int step = run / 2; step; step /= 2) {
            __syncthreads();
            for (int n = threadIdx.x; n < P / 2; n += blockDim.x) {
                const int i = 2 * n - n % step, j = i + step;
                const uint64_t a = row.key[i], b = row.key[j];
                const uint16_t a_id = row.id[i], b_id = row.id[j];
                const bool first = a > b || (a == b && a_id < b_id), falling = (i & run) == 0;
                if (first == falling) continue;
                row.key[i] = b, row.key[j] = a;
                row.id[i] = b_id, row.id[j] = a_id;
            }
        }
    }
    __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(256)
router_sort_kernel(router_rule rule, int P, const T *logits_TE, const float *bias_E, const int32_t *forced_TK,
                   T *weights_TK, int32_t *ids_TK, T *scores_TE, verdict complain) {
    const sorted_row row(shared_memory(), P);
    const int E = rule.E, K = rule.K;
    const int64_t t = blockIdx.x;
    int32_t *ids_K = ids_TK + t * K;
    const auto bias_of = [=](int e) { return bias_E ? bias_E[e] : 0.0f; };

    int open = 0;
    float top = -INFINITY;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        const float x = to_float(logits_TE[t * E + e]);
        open += unmasked(x) + finite_bias(bias_of(e));
        top = fmaxf(top, x);
    }
    const bool bad = block_sum(open, reinterpret_cast<int *>(row.scratch)) < (rule.balanced ? E : K);
    if (bad && threadIdx.x == 0) complain(MOE_BAD_VALUE, t * E);
    top = block_max(top, row.scratch);
    const auto logit = [=](int e) { return bad ? NAN : to_float(logits_TE[t * E + e]); };

    float sum = 1;
    if (rule.score == MOE_SIGMOID) {
        for (int e = threadIdx.x; e < E; e += blockDim.x) row.value[e] = sigmoid<float>(logit(e));
    } else {
        for (int e = threadIdx.x; e < E; e += blockDim.x) row.value[e] = vexp_f32(logit(e) - top);
        __syncthreads();
        if (threadIdx.x < 16) {                             // the order of sum_of_row
            float part = 0;
            for (int e = threadIdx.x; e < E; e += 16) part += row.value[e];
            row.scratch[threadIdx.x] = part;
        }
        __syncthreads();
        sum = 0;
        for (int l = 0; l < 16; l++) sum += row.scratch[l];
    }

    for (int e = threadIdx.x; e < P; e += blockDim.x) {
        row.key[e] = 0;
        row.id[e] = static_cast<uint16_t>(e);
        if (e >= E) continue;
        const float x = logit(e), score = row.value[e] / sum;
        scores_TE[t * E + e] = from_float<T>(score);
        row.key[e] = ordered(bias_E ? choice<true>(rule.score, x, score, bias_E[e])
                                    : double{choice<false>(rule.score, x, score, 0)});
        row.value[e] = rule.score == MOE_TOPK_SOFTMAX ? x : score;
    }
    if (forced_TK) {
        for (int k = threadIdx.x; k < K; k += blockDim.x) {
            const bool bad = bad_choice(forced_TK + t * K, k, E);
            if (bad) complain(MOE_BAD_INDEX, t * K + k);
            ids_K[k] = bad ? -1 : forced_TK[t * K + k];
        }
    } else if (!rule.balanced) {
        sort(row, P);
    }
    __syncthreads();
    if (warp_id() > 0) return;
    const auto id = [=](int k) {
        return forced_TK ? ids_K[k] : rule.balanced ? static_cast<int>((t * K + k) % E) : row.id[k];
    };
    for (int k = lane_id(); k < K && !forced_TK; k += 32) ids_K[k] = id(k);
    const float absent = rule.score == MOE_TOPK_SOFTMAX ? -INFINITY : 0;
    store_weights<32>(rule, true, [=](int k) { return id(k) < 0 ? absent : row.value[id(k)]; }, weights_TK + t * K);
}

template <int w, int v>
struct tile { static constexpr int W = w, V = v; };

// f(the lanes per row and experts per lane for E <= 512).
template <class F>
static int by_tile(int E, F f) {
    if (E <= 8)   return f(tile<8, 1>());
    if (E <= 32)  return f(tile<32, 1>());
    if (E <= 64)  return f(tile<32, 2>());
    if (E <= 128) return f(tile<32, 4>());
    if (E <= 256) return f(tile<32, 8>());
    return f(tile<32, 16>());
}

int moe_router(const moe_router_args *a, const void *logits_TE, const float *select_bias_E, const int32_t *forced_TK,
               void *weights_TK, int32_t *ids_TK, void *scores_TE, cudaStream_t stream) {
    return by_float(a->dtype, [&]<class T>(T) {
        router_rule rule;
        TRY(check_router(*a, &rule));
        const auto *logits = static_cast<const T *>(logits_TE);
        auto *weights = static_cast<T *>(weights_TK), *scores = static_cast<T *>(scores_TE);
        const verdict complain = verdict_of(OP_router);
        if (rule.E > 512 || rule.K > 32) {
            int P = 1;
            while (P < rule.E) P *= 2;
            return launch(router_sort_kernel<T>, rule.T, 256, sorted_row::bytes(P), stream, rule, P, logits,
                          select_bias_E, forced_TK, weights, ids_TK, scores, complain);
        }
        return by_tile(rule.E, [&]<class Tile>(Tile) {
            constexpr int W = Tile::W, V = Tile::V, rows = 128 / W;
            const auto kernel = select_bias_E ? router_kernel<T, true, W, V> : router_kernel<T, false, W, V>;
            const bool vectors = rule.E % V == 0 && aligned16(logits) && aligned16(scores);
            return launch(kernel, ceil_div(rule.T, rows), 128, rows * W * (V + 1) * sizeof(float), stream, rule,
                          vectors, logits, select_bias_E, forced_TK, weights, ids_TK, scores, complain);
        });
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Forward was: w = scale * v, v = u / n, n = |u|_p; u = score[ids] or softmax(logit[ids]); score = softmax or
// sigmoid(logit). With S = sum_k dw_k v_k:
//   du_k = scale / n * (dw_k - S * dn/du_k)
//   dn/du_k = v_k^(p-1), 0 at u_k = 0; for p = INFINITY 1 / the number of maxima at each of them
template <class T>
__global__ void __launch_bounds__(128)
router_backward_kernel(router_rule rule, const T *logits_TE, const T *scores_TE, const int32_t *ids_TK,
                       const T *dweights_TK, const T *dscores_TE, T *dlogits_TE, verdict complain) {
    const int64_t t = static_cast<int64_t>(blockIdx.x) * 4 + warp_id();
    if (t >= rule.T) return;
    const int E = rule.E, K = dweights_TK ? rule.K : 0;
    const bool kept = rule.score == MOE_TOPK_SOFTMAX;
    const T *logits_E = logits_TE + t * E, *scores_E = scores_TE + t * E;
    const int32_t *ids_K = ids_TK + t * rule.K;
    T *dlogits_E = dlogits_TE + t * E;

    bool wrong = false;
    for (int k = lane_id(); k < rule.K; k += 32) {
        if (ids_K[k] >= -1 && ids_K[k] < E) continue;
        complain(MOE_BAD_INDEX, t * rule.K + k);
        wrong = true;
    }
    if (__any_sync(0xffffffffu, wrong)) {
        for (int e = lane_id(); e < E; e += 32) dlogits_E[e] = from_float<T>(0);
        return;
    }

    const auto dweight = [=](int k) { return ids_K[k] < 0 ? 0 : to_float(dweights_TK[t * K + k]); };
    const T *value_E = kept ? logits_E : scores_E;
    const float absent = kept ? -INFINITY : 0;
    const auto u = kept_weights<32>(rule, [=](int k) { return ids_K[k] < 0 ? absent : to_float(value_E[ids_K[k]]); });
    const float p = rule.p, n = p_norm<32>(p, K, u);
    const float factor = n > 0 && n < INFINITY ? rule.scale / n : 0;
    const float S = p > 0 && factor != 0 ? sum_over<32>(K, [=](int k) { return dweight(k) * (u(k) / n); }) : 0;
    const float maxima = p == INFINITY ? sum_over<32>(K, [=](int k) { return u(k) == n ? 1.0f : 0.0f; }) : 1;
    const auto du = [=](int k) {
        const float u_k = u(k);
        float dn = 0;
        if (S != 0 && u_k > 0) dn = p == 1 ? 1 : p < INFINITY ? powf(u_k / n, p - 1) : u_k == n ? 1 / maxima : 0;
        return factor * (dweight(k) - S * dn);
    };

    // What comes through the scores alone; more: beside dscores.
    const auto dscore = [=](int e) { return dscores_TE ? to_float(dscores_TE[t * E + e]) : 0.0f; };
    float mean = dscores_TE ? sum_over<32>(E, [=](int e) { return to_float(scores_E[e]) * dscore(e); }) : 0;
    const float kept_mean = sum_over<32>(K, [=](int k) { return u(k) * du(k); });
    if (!kept) mean += kept_mean;
    const auto dlogit = [=](int e, float more) {
        const float ds = dscore(e) + more;
        if (rule.score != MOE_SIGMOID) return to_float(scores_E[e]) * (ds - mean);
        const float s = 1 / (1 + vexp_f32(fabsf(to_float(logits_E[e]))));       // s (1-s) without cancellation in 1-s
        return ds * s * (1 - s);
    };
    for (int e = lane_id(); e < E; e += 32) dlogits_E[e] = from_float<T>(dlogit(e, 0));
    __syncwarp();                                                               // then the chosen, again
    for (int k = lane_id(); k < K; k += 32) {
        const int e = ids_K[k];
        if (e < 0) continue;
        dlogits_E[e] = from_float<T>(kept ? dlogit(e, 0) + u(k) * (du(k) - kept_mean) : dlogit(e, du(k)));
    }
}

int moe_router_backward(const moe_router_args *a, const void *logits_TE, const void *scores_TE, const int32_t *ids_TK,
                        const void *dweights_TK, const void *dscores_TE, void *dlogits_TE, cudaStream_t stream) {
    return by_float(a->dtype, [&]<class T>(T) {
        router_rule rule;
        TRY(check_router(*a, &rule));
        return launch(router_backward_kernel<T>, ceil_div(rule.T, 4), 128, 0, stream, rule,
                      static_cast<const T *>(logits_TE), static_cast<const T *>(scores_TE), ids_TK,
                      static_cast<const T *>(dweights_TK), static_cast<const T *>(dscores_TE),
                      static_cast<T *>(dlogits_TE), verdict_of(OP_router_backward));
    });
}
